"""How the processes of a run divide its model among them."""

from __future__ import annotations

from pydantic import Field

from tuner.config.base import ConfigBase
from tuner.errors import UserError


class Parallel(ConfigBase):
    """Layout of a run's processes: memory and speed, never the result. Every process trains on rows of its own."""

    shard: int = Field(default=1, ge=1)
    """Processes that hold the frozen weights together, each its share (FSDP2), and gather a layer while they compute
    it; 1: every process holds them whole. Trained weights, and so adapters, are always held whole."""

    def refuse(self, processes: int) -> None:
        """Raise UserError where a run of so many processes cannot be laid out like this."""
        if processes % self.shard:
            raise UserError(
                f"parallel.shard={self.shard}: {processes} {'process' if processes == 1 else 'processes'} cannot be "
                f"divided into groups of {self.shard}; start a multiple of it (--processes), or lower it"
            )
