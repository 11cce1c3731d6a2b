"""Rows that several processes compute together, each a run of their tokens (Ulysses, Jacobs et al., arXiv 2309.14509).

Layers compute each token alone, but for attention: there the processes exchange tokens for heads, so that each attends
over whole segments with its share of the heads. A loss is taken on the process that holds the token before its target.
What a pass returns is of the whole row, on each of its processes; gradients are of the process's own part, and add up
to those of the whole in the sum over all processes.

Shapes: T tokens of a row, n processes, H heads, D head size, N places in the row.
"""

# torch annotates some of its functions only in part
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from tuner.data.batch import Batch
from tuner.errors import UserError
from tuner.models.load import Loaded
from tuner.models.segment_rope import depends_on_length
from tuner.models.unwrap import unwrapped

if TYPE_CHECKING:  # rows of one process do not load it
    from torch.distributed.device_mesh import DeviceMesh


def refuse_shared_rows(loaded: Loaded, processes: int) -> None:
    """Raise UserError for a model whose rows cannot be computed by so many processes; it may be on the meta device."""
    config = loaded.transformer.config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % processes or (key_heads % processes and processes % key_heads):
        raise UserError(
            f"parallel.sequence={processes}: {loaded.base.path} has {heads} attention heads, and {key_heads} of keys "
            f"and values, which {processes} processes cannot divide among them; choose a divisor of the first"
        )
    if depends_on_length(loaded.transformer):
        raise UserError(
            f"parallel.sequence: {loaded.base.path} has layers that scale positions by the length of what they read, "
            "of which a process sees a part; leave parallel.sequence out"
        )


def share_rows(loaded: Loaded, processes: DeviceMesh) -> None:
    """Make the passes of a model's rows those of several processes, in place; see `refuse_shared_rows`."""
    refuse_shared_rows(loaded, processes.size())
    vars(loaded.transformer)["row_processes"] = processes


@dataclass(frozen=True)
class RowPart:
    """This process's part of a row; the whole row where no other computes it."""

    row: Batch
    """The whole row; of several processes with a dead segment behind it, so that all parts are equally long."""
    processes: DeviceMesh | None

    @classmethod
    def of(cls, model: nn.Module, batch: Batch) -> RowPart:
        """The part of a batch that a model's pass computes here."""
        processes: DeviceMesh | None = getattr(unwrapped(model), "row_processes", None)
        return cls(batch if processes is None else _padded(batch, processes.size()), processes)

    @property
    def bounds(self) -> tuple[int, int]:
        """(first token, one past the last) in the row."""
        if self.processes is None:
            return 0, len(self.row.tokens_T)
        length = len(self.row.tokens_T) // self.processes.size()
        first = self.processes.get_local_rank() * length
        return first, first + length

    def places(self, places_N: Tensor) -> tuple[slice, Tensor]:
        """Of ascending places in the row those in this part: which they are, and where in the part."""
        if self.processes is None:
            return slice(None), places_N
        first, end = self.bounds
        borders = torch.tensor([first, end], device=places_N.device)
        own = slice(*torch.searchsorted(places_N, borders).tolist())
        return own, places_N[own] - first

    def joined(self, values: Tensor, own: slice, count: int) -> Tensor:
        """Values at all `count` places of the row, from those of each part; differentiable by this part's own."""
        if self.processes is None:
            return values
        return _Joined.apply(values, own.start, count, self.processes.get_group())

    def summed(self, value: Tensor) -> Tensor:
        """The sum of a scalar over the parts; differentiable by this part's own."""
        if self.processes is None:
            return value
        rank = self.processes.get_local_rank()
        return self.joined(value[None], slice(rank, rank + 1), self.processes.size()).sum()


class _Joined(torch.autograd.Function):
    """The values of all parts in their order: a sum with zeros, which is exact; each part gets its own gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, start: int, count: int, group: Any) -> Tensor:
        ctx.own = slice(start, start + len(value))
        whole = value.new_zeros(count)
        whole[ctx.own] = value
        distributed.all_reduce(whole, group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        return grads[0][ctx.own], None, None, None


def _padded(batch: Batch, multiple: int) -> Batch:
    """The row with a dead segment behind it, so that its length is a multiple; the places of losses stay."""
    missing = -len(batch.tokens_T) % multiple
    if not missing:
        return batch
    positions = torch.arange(missing, device=batch.tokens_T.device)
    return replace(
        batch,
        tokens_T=nn.functional.pad(batch.tokens_T, (0, missing)),
        positions_T=torch.cat([batch.positions_T, positions]),
        offsets=torch.cat([batch.offsets, batch.offsets[-1:] + missing]),
        borders=(*batch.borders, batch.borders[-1] + missing),
    )
