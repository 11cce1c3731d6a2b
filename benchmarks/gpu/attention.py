"""Attention kernels: a packed row against its samples alone, and bf16 against fp32, forward and backward.

tuner itself takes flash-attn 2 where it is installed, else torch's varlen kernel, and scaled_dot_product_attention per
sample where neither runs; flash-attn 3 and 4 are called here with their own functions, to know what they would give.
Shapes: T tokens of the row, H query heads, K key and value heads, D head size.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Measurement, NotHereError, Place
from tuner.models import varlen

LENGTHS = (1, 5, 130, 1000, 2960)
"""Of the samples: below, at and above the kernels' blocks."""
DRY_LENGTHS = (1, 5, 17)
HEADS, KEY_HEADS, HEAD_SIZE = 32, 8, 128
"""InternLM2-7B's."""
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""From q [T, H, D], k and v [T, K, D], the samples' offsets (int32) and the longest one's length to [T, H, D]."""
FLASH: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "flash_2": ("flash_attn", "flash-attn 2"),
        "flash_3": ("flash_attn_interface", "flash-attn 3"),
        "flash_4": ("flash_attn.cute", "flash-attn 4"),
    }
)
"""Backend -> module with its flash_attn_varlen_func, and its name."""
BACKENDS = ("sdpa", "torch_varlen", *FLASH)


def measure(backend: str, place: Place) -> Iterator[Measurement]:
    """Relative errors by norm, the largest over output and gradients of q, k and v, each by its own norm.

    `packed` is the packed row in bf16 against its samples alone by the same kernel; `rounding` is against fp32, sample
    by sample, by scaled_dot_product_attention.
    """
    attend = _attend(backend, place)
    lengths = DRY_LENGTHS if place.is_dry else LENGTHS
    inputs = _inputs(place, sum(lengths))
    packed = _with_gradients(attend, inputs, lengths)
    parts = zip(*(tensor.split(lengths) for tensor in inputs), strict=True)
    alone = [_with_gradients(attend, part, [len(part[0])]) for part in parts]
    joined = [torch.cat(tensors) for tensors in zip(*alone, strict=True)]
    exact = _with_gradients(_sdpa, tuple(tensor.float() for tensor in inputs), lengths)
    for part, at in {"forward": slice(0, 1), "backward": slice(1, None)}.items():
        yield Measurement(f"packed_{part}", _error(packed[at], joined[at]), "")
        yield Measurement(f"rounding_{part}", _error(packed[at], exact[at]), "")


def _attend(backend: str, place: Place) -> Attend:
    if backend == "sdpa":
        return _sdpa
    if backend == "torch_varlen":
        if not varlen.has_kernels(place.device):
            raise NotHereError("torch's varlen kernel needs a GPU from compute capability 8.0 on")
        return lambda q, k, v, offsets, longest: varlen._torch_varlen(q, k, v, offsets, longest, None, None)
    module, name = FLASH[backend]
    try:
        function = importlib.import_module(module).flash_attn_varlen_func
    except (ImportError, AttributeError) as error:
        raise NotHereError(f"{name} is not installed") from error
    if place.device.type != "cuda":
        raise NotHereError(f"{name} needs a GPU")
    if backend == "flash_2":
        return lambda q, k, v, offsets, longest: varlen._flash(q, k, v, offsets, longest, None, None)
    return by_flash(function)


def by_flash(function: Callable[..., Any]) -> Attend:
    """A release's flash_attn_varlen_func as `Attend`: their parameters share names, but not all have all of them."""
    names = inspect.signature(function).parameters

    def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        settings = {
            "cu_seqlens_q": offsets,
            "cu_seqlens_k": offsets,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
            "causal": True,
        }
        out = function(q, k, v, **{name: value for name, value in settings.items() if name in names})
        return out[0] if isinstance(out, tuple) else out  # some return the logsumexp as well

    return attend


def _sdpa(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """What tuner does without a kernel: a call for each sample."""
    borders = tuple(offsets.tolist())
    lengths = [end - start for start, end in itertools.pairwise(borders)]
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return varlen._by_segment(query, key, value, lengths, None, None)[0].transpose(0, 1)


def _inputs(place: Place, tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(place.device).manual_seed(0)
    return tuple(
        torch.randn(
            (tokens, heads, HEAD_SIZE), generator=generator, device=place.device, dtype=torch.bfloat16
        )
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )


def _with_gradients(attend: Attend, inputs: tuple[Tensor, ...], lengths: Any) -> list[Tensor]:
    """The output, and the gradients of q, k and v under a sum that weighs the heads and their numbers differently."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=inputs[0].device)
    out = attend(leaves[0], leaves[1], leaves[2], offsets, max(lengths))
    weights = torch.linspace(0.5, 1.5, out.shape[1] * out.shape[2], device=out.device).view(out.shape[1:])
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), leaves)]


def _error(values: list[Tensor], exact: list[Tensor]) -> float:
    return max(
        float((value.float() - other.float()).norm() / other.float().norm())
        for value, other in zip(values, exact, strict=True)
    )
