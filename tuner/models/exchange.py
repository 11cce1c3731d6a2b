"""The exchange of tokens for heads around attention, in rows that several processes compute together.

Each holds all heads of its part of the tokens; it gets a share of the heads of all tokens, and sends back what it has
attended with them (Ulysses, Jacobs et al., arXiv 2309.14509). Shapes: T tokens of the row, n processes, H heads, D head
size.
"""

# torch annotates some of its functions only in part
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:  # rows of one process do not load it
    from torch.distributed.device_mesh import DeviceMesh


def whole_segments(part_1HtD: Tensor, processes: DeviceMesh) -> Tensor:
    """From all heads of a part's tokens to a share of the heads of all tokens: [1, H, T / n, D] to [1, H / n, T, D].

    Fewer heads than processes, of keys and values, are repeated.
    """
    heads, count = part_1HtD.shape[1], processes.size()
    if heads % count:
        part_1HtD = part_1HtD.repeat_interleave(count // heads, dim=1)
    return _Exchanged.apply(part_1HtD, processes.get_group(), 1, 2)


def own_tokens(heads_1HTD: Tensor, processes: DeviceMesh) -> Tensor:
    """The way back: [1, H / n, T, D] to [1, H, T / n, D]."""
    return _Exchanged.apply(heads_1HTD, processes.get_group(), 2, 1)


class _Exchanged(torch.autograd.Function):
    """Cut a tensor along one dimension, send part i to process i, and join what comes along another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any, cut: int, join: int) -> Tensor:
        ctx.way = group, cut, join
        sent = torch.stack(value.chunk(distributed.get_world_size(group), dim=cut))
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(), dim=join)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        group, cut, join = ctx.way
        return _Exchanged.apply(grads[0].contiguous(), group, join, cut), None, None, None
