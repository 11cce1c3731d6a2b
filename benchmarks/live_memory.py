"""Counts the memory of tensors as they come and go, on a CPU that computes with a GPU's casts and kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.kernels import chunked_logprob

from tuner.models import arithmetic, kept_products, varlen


class LiveMemory(TorchDispatchMode):
    """Bytes of all storages that operations inside it allocate, while they are alive: what a GPU's allocator counts.

    Memory within an operation (a matrix product's workspace) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes alive now, beside those held from the start."""
        self.peak = 0
        """Most bytes alive at any time."""
        self._host = 0
        self.host_peak = 0
        """Most bytes alive at any time of those that `on_host` makes."""
        self._known: set[int] = set()

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._count(tensor)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak, self.host_peak = self.live, self._host

    def on_host(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A function whose tensor is counted as the host's, and not with the others."""

        def made(*arguments: Any) -> torch.Tensor:
            with _unseen():
                tensor = make(*arguments)
            storage = tensor.untyped_storage()
            self._known.add(storage._cdata)
            self._host += storage.nbytes()
            self.host_peak = max(self.host_peak, self._host)
            weakref.finalize(storage, self._release_host, storage._cdata, storage.nbytes())
            return tensor

        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        # torch keeps one Python object for a storage as long as the storage lives
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _release_host(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._host -= size


class SavedTensors:
    """Bytes of the distinct storages that autograd saves for the backward pass, without those of weights."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._saved: dict[int, torch.UntypedStorage] = {}

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._saved.values())

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is saved inside."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._weights:
                self._saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


@contextmanager
def cuda_arithmetic() -> Iterator[None]:
    """Compute on a CPU as on CUDA, as far as it decides what is held.

    bf16 products whatever the CPU; `torch.is_autocast_enabled()`, which peft asks without naming a device, is true
    inside a CPU's autocast; dropout saves a mask of bytes; attention saves what its kernels save, and key heads once;
    TRL's log-probabilities of a tile are made in place.
    """
    enabled = torch.is_autocast_enabled
    with (
        patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device)),
        patch.object(arithmetic, "computes_in_bf16", lambda device: True),
        patch.object(torch.nn.functional, "dropout", _dropout),
        patch.object(varlen, "_by_segment", _by_kernel),
        patch.object(kept_products, "PRODUCTS", kept_products.PRODUCTS | {"live_memory::attention"}),
        patch.object(chunked_logprob, "_forward_tile", _in_kernel(chunked_logprob._forward_tile)),
        patch.object(chunked_logprob, "_addmm_fp32", _in_kernel(chunked_logprob._addmm_fp32)),
        patch.object(chunked_logprob, "_backward_tile", _in_kernel(chunked_logprob._backward_tile)),
    ):
        yield


def _in_kernel(function: Any) -> Any:
    def uncounted(*arguments: Any, **settings: Any) -> Any:
        with _unseen():
            return function(*arguments, **settings)

    return uncounted


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    if query.dtype == torch.float32:  # no kernel computes in fp32: as on CUDA, a call per segment
        return _as_before(query, key, value, lengths, scaling, window)
    query, key, value = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    return _Kernel.apply(query, key, value, tuple(lengths), scaling, window).transpose(0, 1)[None]


_as_before = varlen._by_segment


class _Kernel(torch.autograd.Function):
    """What `varlen_attn` saves: query, key, value, output, and the logarithm of each row's sum; [T, H, D] each."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, lengths: Any, scaling: Any, window: Any) -> Any:
        out, sums = _attention(query, key, value, lengths, scaling, window)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.arguments = lengths, scaling, window
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        # gradients: of queries also summed in fp32, of shared key heads one for each query head first
        workspace = [torch.empty_like(query, dtype=torch.float32)]
        if groups > 1:
            workspace += [torch.empty_like(query), torch.empty_like(query)]
        del workspace
        with torch.enable_grad():
            parts = [part.detach().requires_grad_() for part in (query, key, value)]
            with _unseen():
                out = _by_segments(*parts, *ctx.arguments)
                gradients = torch.autograd.grad(out, parts, upstream)
        return *(gradient.clone() for gradient in gradients), None, None, None


@torch.library.custom_op("live_memory::attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scaling: float | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As a kernel an operation of its own, which selective recomputation keeps: output and sums."""
    sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return _by_segments(query, key, value, lengths, scaling, window), sums


def _by_segments(query: Any, key: Any, value: Any, lengths: Any, scaling: Any, window: Any) -> Any:
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    return _as_before(*parts, list(lengths), scaling, window)[0].transpose(0, 1).contiguous()


@contextmanager
def _unseen() -> Iterator[None]:
    """Operations inside are not counted: a kernel on CUDA has none of their tensors."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield
