"""Layers' inputs that wait in host memory for the backward pass, of which the device holds two at a time.

On CUDA they travel on a stream of their own, from and to pinned memory. While layer i is computed, the input of layer
i - 1 goes to the host; while layer i is computed again, and goes backward, the input of layer i - 1 comes back.

Which stream may use which memory, and when:
- A copy begins when the device has done all that was asked of it so far (`wait_stream`): what goes out has then been
  computed, and memory that a copy comes into, which the caller's stream has allocated, is no longer used by those who
  had it before.
- The caller's stream waits for the copy (`wait_event`) before the tensor on the device is used or let go. Whoever gets
  its memory next does so on the caller's stream, and so after the copy. `record_stream` would do that, too, but at the
  allocator's leisure: the memory would return when a later request happens to ask whether the copy is done, and three
  or four inputs would be held instead of two.
- The host does not wait. A pinned block that is let go is given to another only after the copies that use it, which
  torch's allocator of pinned memory notes at every `copy_(non_blocking=True)`.
On a CPU the same copies are made, one after another.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint


class Offload:
    """Checkpointing of a model's layers whose inputs wait in host memory; transformers calls it for each layer."""

    def __init__(self) -> None:
        self._last: Callable[[], _Input | None] = lambda: None
        """The newest input that waits, while its graph is alive."""

    def __call__(self, layer: Callable[..., Any], hidden: Tensor, *further: Any) -> Any:
        """What a layer makes of hidden states [1, T, D]; further arguments stay where they are."""
        before = self._last()
        own = _Input(hidden, before)

        def run(_: Tensor) -> Any:
            return layer(own.given_out(), *further)

        # checkpoint keeps what it is given on the device, but must know the device, whose random state it keeps
        result = checkpoint(run, hidden.new_empty(0), use_reentrant=False)
        if any(isinstance(part, Tensor) and part.requires_grad for part in tree_leaves(result)):
            if before is not None:
                before.leave_device()
            own.send()
            self._last = weakref.ref(own)
        return result  # of frozen layers, or without gradients, nothing has kept `own`


class _Input:
    """A layer's input between its forward and its backward pass."""

    def __init__(self, hidden: Tensor, before: _Input | None) -> None:
        self._first: Tensor | None = hidden
        """For the layer's first computation, with the graph that leads to it."""
        self._needs_gradient, self._device = hidden.requires_grad, hidden.device
        self._near: Tensor | None = hidden.detach()
        self._far: Tensor | None = None
        self._moved: Any = None
        """CUDA's event of the end of the last copy."""
        self._before = (lambda: None) if before is None else weakref.ref(before)
        self._is_used = False
        """Whether the backward pass has been here."""

    def given_out(self) -> Tensor:
        """The input: as it came, and then for each time that the layer is computed again."""
        if self._first is not None:
            hidden, self._first = self._first, None
            return hidden
        self.fetch()
        hidden = self._near
        assert hidden is not None
        self._is_used = True
        self.leave_device()
        before = self._before()
        if before is not None and not before._is_used:
            before.fetch()
        return hidden.requires_grad_(self._needs_gradient)

    def send(self) -> None:
        """Begin to copy it to the host."""
        assert self._near is not None
        self._far = host_like(self._near)
        self._moved = _copy(self._near, self._far)

    def fetch(self) -> None:
        """Begin to copy it back, unless it is on the device."""
        if self._near is None:
            assert self._far is not None
            self._near = torch.empty_like(self._far, device=self._device)
            self._moved = _copy(self._far, self._near)

    def leave_device(self) -> None:
        """Let the tensor on the device go, which a copy may still use or come into."""
        if self._moved is not None:
            torch.cuda.current_stream(self._device).wait_event(self._moved)
        self._near = self._moved = None

    def __del__(self) -> None:  # a graph may be let go before its backward pass, as when a pass fails
        self.leave_device()


def host_like(tensor: Tensor) -> Tensor:
    """Memory on the host for a tensor; of one on CUDA it is pinned, without which copies would wait for the host."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def _copy(source: Tensor, target: Tensor) -> Any:
    """Begin a copy between host and device; returns the CUDA event of its end, None where it is done already."""
    device = source.device if source.is_cuda else target.device
    if device.type != "cuda":
        target.copy_(source)
        return None
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        return stream.record_event()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which copies travel, in their order: what comes back has gone out before."""
    return torch.cuda.Stream(device)
