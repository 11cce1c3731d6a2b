"""The layout of a run's processes: groups that hold a model's frozen weights together, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from tuner.config.parallel import Parallel
from tuner.data.packing import Share

if TYPE_CHECKING:  # a run in one process does not load it
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """Replicas × shards: each replica holds the frozen weights once, in shards over its neighboring processes."""

    share: Share
    """This process's part of the passes of a step: every process trains on rows of its own."""
    shards: DeviceMesh | None
    """The processes of this one's replica; None: it holds the weights whole."""

    @classmethod
    def of(cls, parallel: Parallel, rank: int, world: int, device: torch.device) -> Self:
        """The place of one process in a layout; all make the call together.

        Raises UserError where so many processes cannot be laid out so.
        """
        parallel.refuse(world)
        share = Share(rank, world, equal=parallel.shard > 1)
        if parallel.shard == 1:
            return cls(share, None)
        from torch.distributed.device_mesh import init_device_mesh

        # shards beside each other, so that they lie on one machine where a machine has as many devices
        sizes, names = (world // parallel.shard, parallel.shard), ("replica", "shard")
        return cls(share, init_device_mesh(device.type, sizes, mesh_dim_names=names)["shard"])
