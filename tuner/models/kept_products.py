"""Selective recomputation: the results of a layer's matrix products are kept, and the rest of it is computed again.

Norms, rotary positions, activations, dropout and casts are memory traffic, cheap beside the products; what they make
is most of what a layer holds. torch's `create_selective_checkpoint_contexts` does the same, but runs Python at every
operation of a layer, some hundreds in a pass forward and again backward. Here it runs at the operations of linear
layers and of attention alone: their results are noted in order, and given out in that order when the layer is computed
again. The second time the operations in between come to the same numbers, as they start from the same layer input and
the same random state (`torch.utils.checkpoint`).
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tuner.models.adapter_kinds import LINEAR
from tuner.models.freeze import decoder_layers

PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "bitsandbytes::gemm_4bit",
    "bitsandbytes::int8_scaled_mm",
    "bitsandbytes::int8_mixed_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
}
"""Operations whose results are kept. Attention as a product of matrices (`bmm`) is not among them: its scores are
T × T."""

_COMPUTED = "what `kept` keeps"
Tensors = TypeVar("Tensors", Tensor, tuple[Tensor, ...])
_pass = threading.local()
"""`mode`: the one under which products run in the layer that is being computed, in this thread: on a GPU layers are
computed again in autograd's."""


def keep_products(model: nn.Module) -> None:
    """Let the linear layers of a model's decoder take part, in place; attention does by itself (`products`).

    Left out are an adapter's second factors: their results are as wide as the layer's, and take `rank` operations a
    number to compute again.
    """
    for name, module in decoder_layers(model)[1].named_modules():
        if isinstance(module, LINEAR) and ".lora_B." not in name:
            module.forward = functools.partial(_with_products, module.forward)


def _with_products(forward: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    mode: _Results | None = getattr(_pass, "mode", None)
    if mode is None:
        return forward(*arguments, **settings)
    with mode:
        result = forward(*arguments, **settings)
    mode.watch(result)
    return result


def products() -> AbstractContextManager[Any]:
    """Keep the products that run inside, or give out those that were kept, where a layer is computed selectively."""
    mode: _Results | None = getattr(_pass, "mode", None)
    return nullcontext() if mode is None else mode


def kept(compute: Callable[[], Tensors]) -> Tensors:
    """What `compute` makes, a tensor or several; of a layer that is computed selectively it is kept, and given out."""
    mode: _Results | None = getattr(_pass, "mode", None)
    if mode is None:
        return compute()
    results = mode.once(compute)
    for result in tree_leaves(results):
        mode.watch(result)
    return results


def no_products() -> AbstractContextManager[None]:
    """Keep no products inside."""
    return _under(None)


def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For `checkpoint`: the contexts of a layer's first computation, and of its second."""
    results: deque[tuple[Any, Any]] = deque()
    return _under(_Keep(results)), _under(_GiveOut(results))


@contextmanager
def _under(mode: _Results | None) -> Generator[None]:
    before = getattr(_pass, "mode", None)
    _pass.mode = mode
    try:
        yield
    finally:
        _pass.mode = before


class _Results(TorchDispatchMode):
    """Products of one layer in one pass, in their order."""

    def __init__(self, results: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self._results = results

    def once(self, compute: Callable[[], Any]) -> Any:
        """What `compute` makes, the first time; and that again."""
        raise NotImplementedError

    def watch(self, result: Tensor) -> None:
        """Notice changes of a linear layer's result, which may be the memory of the product that is kept."""
        raise NotImplementedError


class _Keep(_Results):
    """The first computation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in PRODUCTS:
            # autograd is about to make these a part of its graph, which holds this layer's results: kept is an alias
            self._results.append((func, tree_map_only(Tensor, Tensor.detach, result)))
        return result

    def once(self, compute: Callable[[], Any]) -> Any:
        results = compute()
        self._results.append((_COMPUTED, tree_map_only(Tensor, Tensor.detach, results)))
        return results

    def watch(self, result: Tensor) -> None:
        self._results.append((result.detach(), result._version))  # which count changes together


class _GiveOut(_Results):
    """The second computation; it holds a result no longer than the layer needs it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        return self._next(func)

    def once(self, compute: Callable[[], Any]) -> Any:
        return self._next(_COMPUTED)

    def _next(self, func: Any) -> Any:
        first, result = self._results.popleft() if self._results else (None, None)
        if first is not func:
            raise RuntimeError(
                f"a layer that is computed again calls {func}, and first called {first}: its operations must not "
                "change between forward and backward pass, nor may a backward pass be made twice"
            )
        return result

    def watch(self, result: Tensor) -> None:
        first, version = self._results.popleft()
        if first._version != version:
            raise RuntimeError(
                "a linear layer's result was changed in place, which selective recomputation would do twice"
            )
