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
    """The processes that hold the model's weights together with this one; None: it holds them whole."""
    replicas: DeviceMesh | None
    """The processes that hold the same part of the weights as this one; None: no other does."""
    row: DeviceMesh | None
    """The processes that compute rows together with this one; None: it computes them alone."""

    @classmethod
    def of(cls, parallel: Parallel, rank: int, world: int, device: torch.device) -> Self:
        """The place of one process in a layout; all make the call together.

        Raises UserError where so many processes cannot be laid out so.
        """
        parallel.refuse(world)
        share = Share(rank // parallel.sequence, world // parallel.sequence, equal=parallel.shard > 1)
        shards, replicas = _groups(parallel.shard, world, device)
        return cls(share, shards, replicas, _groups(parallel.sequence, world, device)[0])

    @property
    def leads_row(self) -> bool:
        """Whether this process is the first of those that compute its rows: what they have in common counts once."""
        return self.row is None or self.row.get_local_rank() == 0

    @property
    def place_in_shards(self) -> tuple[int, int]:
        """Which of the processes this is that hold the weights together, counted from 1, and how many they are."""
        return (1, 1) if self.shards is None else (self.shards.get_local_rank() + 1, self.shards.size())


def _groups(size: int, world: int, device: torch.device) -> tuple[DeviceMesh | None, DeviceMesh | None]:
    """This process's group of `size` neighbors, and those that have the same place in other groups.

    None where it is alone; without groups both are. All processes make the call together.
    """
    if size == 1:
        return None, None
    from torch.distributed.device_mesh import init_device_mesh

    sizes, names = (world // size, size), ("groups", "group")
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    return mesh["group"], mesh["groups"] if world > size else None
