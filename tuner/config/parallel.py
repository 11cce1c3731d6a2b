"""How the processes of a run divide its model among them."""

from __future__ import annotations

from pydantic import Field

from tuner.config.base import ConfigBase
from tuner.errors import UserError


class Parallel(ConfigBase):
    """Layout of a run's processes: memory and speed, never the result."""

    shard: int = Field(default=1, ge=1)
    """Processes that hold the weights together, each its share (FSDP2), and gather a layer while they compute it; 1:
    every process holds them whole. Without an adapter also trained ones, with gradients and optimizer state; what an
    adapter trains is always held whole."""

    sequence: int = Field(default=1, ge=1)
    """Processes that compute each row together, a run of its tokens each (Ulysses), so that longer rows fit; 1: every
    process computes rows of its own. They may hold the weights together as well."""

    def refuse(self, processes: int) -> None:
        """Raise UserError where a run of so many processes cannot be laid out like this."""
        for name, size in (("shard", self.shard), ("sequence", self.sequence)):
            if processes % size:
                raise UserError(
                    f"parallel.{name}={size}: {processes} {'process' if processes == 1 else 'processes'} cannot be "
                    f"divided into groups of {size}; start a multiple of it (--processes), or lower it"
                )
