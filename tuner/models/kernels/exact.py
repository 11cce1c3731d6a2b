"""A model computed in a higher precision from the weights that it has, without a copy of them: it tells rounding from
error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from tuner.models.quantization import quantized_layers

_LOWER = {
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float64: (torch.bfloat16, torch.float16, torch.float32),
}


@contextmanager
def computed_in(dtype: torch.dtype, model: nn.Module) -> Generator[None]:
    """Inside it the passes of a model are in fp32 or fp64, but for products of quantized layers.

    Every operation takes its inputs in that precision, also where the model's code asks for a lower one. Weights in 4
    bit are de-quantized as in training, and multiplied in fp32; layers in 8 bit are as ever.
    """
    layers = [layer for _, layer in quantized_layers(model)]
    before = [dict(vars(layer)) for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(_quantized, layer.forward, dtype)
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = torch.float32
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False), _Computed(dtype):
            yield
    finally:
        for layer, attributes in zip(layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(attributes)


def _quantized(forward: Callable[[Tensor], Tensor], dtype: torch.dtype, hidden: Tensor) -> Tensor:
    """bitsandbytes' functions take scales in fp32 alone."""
    with torch._C.DisableTorchFunction():
        return forward(hidden.float()).to(dtype)


class _Computed(TorchFunctionMode):
    """Gives each function of torch a precision in place of lower ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype, self._lower = dtype, _LOWER[dtype]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # attributes, such as a dtype
            return func(*args, **kwargs)
        if func is embedding:  # rows are picked first: all of them would be gigabytes
            return func(*args, **kwargs).to(self._dtype)
        if func is Tensor.float:
            return args[0].to(self._dtype)
        if func is linear and self._is_lower(args[1]):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            product = _Product.apply(args[0].to(self._dtype), args[1])
            return product if bias is None else product + bias.to(self._dtype)
        return func(*tree_map(self._raised, args), **tree_map(self._raised, kwargs))

    def _is_lower(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype in self._lower

    def _raised(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self._dtype if value in self._lower else value
        return value.to(self._dtype) if self._is_lower(value) else value


class _Product(torch.autograd.Function):
    """A product in the precision of its input; kept for the backward pass is the weight as it is."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden if weight.requires_grad else None, weight)
        return hidden @ weight.to(hidden.dtype).T

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        (gradient,) = upstream
        of_weight = None
        if hidden is not None:
            of_weight = (gradient.flatten(0, -2).T @ hidden.flatten(0, -2)).to(weight.dtype)
        return gradient @ weight.to(gradient.dtype), of_weight
