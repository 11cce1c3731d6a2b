"""Liger's Triton kernels (Hsu et al., arXiv 2410.10989) for norms, rotary positions and gated MLPs of a loaded model.

Liger's own patches replace classes of transformers, for all models of the process, by lists of families. Here modules
of one model are given a forward pass that calls Liger's autograd functions, wherever the code of their own is that of
Llama or Gemma: families of transformers have copies of it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, GELUTanh
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama

_ROTATE = "apply_rotary_pos_emb"
"""Function of a family's file that its attention calls."""
_SILU = (nn.SiLU, ACT2CLS["silu"])


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run here; None where they can."""
    if device.type != "cuda":
        return f"is for CUDA, and this is {device.type}"
    if find_spec("liger_kernel") is None:
        return "is not installed here (pip install liger-kernel)"
    return None


def install(model: nn.Module) -> int:
    """Give parts of a model Liger's forward and backward passes, in place; returns how many.

    Other parts stay as they are, as do those whose forward pass has been replaced already.
    """
    replaced = 0
    for module, forward in list(_replacements(model)):
        if "forward" not in vars(module):
            module.forward = forward(module)
            replaced += 1
    return replaced


def _replacements(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Any], Callable[..., Any]]]]:
    """Modules that have a formula of Liger's, and from a module to its new forward pass."""
    for module in model.modules():
        plain = getattr(type(module), "forward", None)
        if _same_code(plain, llama.LlamaRMSNorm.forward):
            yield module, _llama_norm
        elif _same_code(plain, GemmaRMSNorm.forward) and _same_code(
            getattr(type(module), "_norm", None), GemmaRMSNorm._norm
        ):
            yield module, _gemma_norm
        elif _same_code(plain, llama.LlamaMLP.forward) and isinstance(module.act_fn, (*_SILU, GELUTanh)):
            yield module, _gated_mlp
        elif _rotates_as_llama(plain):
            yield module, _rotary


def _llama_norm(module: Any) -> Callable[..., Any]:
    return functools.partial(_norm, module, epsilon=module.variance_epsilon, offset=0.0, casts="llama")


def _gemma_norm(module: Any) -> Callable[..., Any]:
    return functools.partial(_norm, module, epsilon=module.eps, offset=1.0, casts="gemma")


def _norm(module: Any, hidden: Tensor, *, epsilon: float, offset: float, casts: str) -> Tensor:
    from liger_kernel.ops import LigerRMSNormFunction  # type: ignore[import-not-found]

    # not in place: in families with a norm after a block, the gradient it would write over goes on beside the norm
    return LigerRMSNormFunction.apply(hidden, module.weight, epsilon, offset, casts, False)


def _gated_mlp(module: Any) -> Callable[..., Any]:
    return functools.partial(_gated, module)


def _gated(module: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.ops import LigerGELUMulFunction, LigerSiLUMulFunction  # type: ignore[import-not-found]

    product = LigerGELUMulFunction if isinstance(module.act_fn, GELUTanh) else LigerSiLUMulFunction
    return module.down_proj(product.apply(module.gate_proj(hidden), module.up_proj(hidden)))


def _rotary(module: Any) -> Callable[..., Any]:
    """The attention's own forward pass, in which the name of the function that rotates means Liger's."""
    plain: Any = inspect.unwrap(type(module).forward)
    names = {**plain.__globals__, _ROTATE: _rotated}
    forward = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    forward.__kwdefaults__ = plain.__kwdefaults__
    return types.MethodType(forward, module)


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Writes over the query and the key, which no backward pass needs as they were."""
    from liger_kernel.ops import LigerRopeFunction  # type: ignore[import-not-found]

    return LigerRopeFunction.apply(query, key, cos, sin)


def _rotates_as_llama(forward: Any) -> bool:
    if forward is None:
        return False
    plain: Any = inspect.unwrap(forward)
    names = getattr(plain, "__globals__", {})
    return (
        _ROTATE in plain.__code__.co_names
        and _same_code(names.get(_ROTATE), llama.apply_rotary_pos_emb)
        and _same_code(names.get("rotate_half"), llama.rotate_half)
    )


def _same_code(function: Any, other: Any) -> bool:
    """Whether two functions are one text but for names of their variables, annotations and docstrings."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return code is not None and _text(code) == _text(inspect.unwrap(other).__code__)


def _text(code: types.CodeType) -> tuple[Any, ...]:
    # a docstring is the first constant
    docstring = code.co_consts[0] if code.co_consts and isinstance(code.co_consts[0], str) else None
    return code.co_code, code.co_names, tuple(value for value in code.co_consts if value != docstring)
