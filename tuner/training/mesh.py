"""The layout of a run's processes: which of them hold a model's frozen weights, or compute a row, together."""

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
    """One process's place in a layout. Groups are of neighboring processes, so that they lie on one machine where a
    machine has as many devices: those that hold the weights once, and those that compute a row."""

    share: Share
    """The part of a step's passes that this process makes, with the others of its row."""
    shards: DeviceMesh | None
    """The processes that hold the frozen weights together with this one; None: it holds them whole."""
    row: DeviceMesh | None
    """The processes that compute rows together with this one; None: it computes them alone."""

    @classmethod
    def of(cls, parallel: Parallel, rank: int, world: int, device: torch.device) -> Self:
        """The place of one process in a layout; all make the call together.

        Raises UserError where so many processes cannot be laid out so.
        """
        parallel.refuse(world)
        share = Share(rank // parallel.sequence, world // parallel.sequence, equal=parallel.shard > 1)
        return cls(
            share, _neighbors(parallel.shard, world, device), _neighbors(parallel.sequence, world, device)
        )

    @property
    def leads_row(self) -> bool:
        """Whether this process is the first of those that compute its rows: what they have in common counts once."""
        return self.row is None or self.row.get_local_rank() == 0


def _neighbors(size: int, world: int, device: torch.device) -> DeviceMesh | None:
    """This process's group of `size` neighbors; None where it is alone. All processes make the call together."""
    if size == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    sizes, names = (world // size, size), ("groups", "group")
    return init_device_mesh(device.type, sizes, mesh_dim_names=names)["group"]
