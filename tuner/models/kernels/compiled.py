"""torch.compile of a model's decoder layers: element-wise work is fused, and the host starts fewer kernels a pass.

Layers of a kind share one compilation, made for any number of tokens and of samples in a row. Attention over packed
rows is called from it as it is: kernels of the GPU are nodes of its graph, the path by segment runs outside it.
"""

from __future__ import annotations

import inspect
import shutil
import types
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shapes

from tuner.models.freeze import decoder_layers

BACKEND = "inductor"
"""torch.compile's."""
COMPILATIONS = 64
"""Most compilations of a kind of layer: roles (adapters) × training and evaluation × kinds of attention, and a row of
one token."""
_OPTIONS: dict[str, Any] = {"fallback_random": True}
"""Inductor's: dropout drops what it drops in a plain run, and a resumed run goes on with the same draws."""


def unavailable(device: torch.device) -> str | None:
    """Why layers cannot be compiled here; None where they can, or only trying tells."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "needs Triton, which is not installed here"
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "needs a C++ compiler, and there is no g++ here"
    return None


def install(model: nn.Module) -> int:
    """Have each decoder layer of a model compile itself in its first pass over packed rows, in place.

    Passes with a cache, as in generation, stay plain: their shapes change with every token. Checkpointing stays
    outside of what is compiled. Returns the number of layers.
    """
    config: Any = torch._dynamo.config
    # past the limit, layers would silently go on plain, with other rounding
    config.recompile_limit, config.fail_on_recompile_limit_hit = COMPILATIONS, True
    # sizes that happen to be equal in the first pack would be taken for one, and other packs compiled anew
    shapes.use_duck_shape = False
    kinds: dict[type, type] = {}
    _, layers = decoder_layers(model)
    for layer in layers:
        kind = type(layer)
        if kind not in kinds:
            kinds[kind] = _compiled(kind)
        layer.__class__ = kinds[kind]
    return len(layers)


def _compiled(kind: Any) -> type:
    """A kind of layer whose passes over packed rows are compiled.

    A subclass, and not a forward pass set on the layer: transformers has each subclass checkpoint its forward pass.
    """
    plain = inspect.unwrap(kind.forward)  # without checkpointing
    options = _OPTIONS if BACKEND == "inductor" else None
    compile_layer: Any = torch.compile
    compiled = compile_layer(_copy(plain), backend=BACKEND, dynamic=True, options=options)

    def forward(self: nn.Module, *arguments: Any, **settings: Any) -> Any:
        is_packed = settings.get("segment_borders") is not None and settings.get("past_key_values") is None
        return (compiled if is_packed else plain)(self, *arguments, **settings)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _copy(function: types.FunctionType) -> types.FunctionType:
    """With a code object of its own, by which compilations are counted: models of a family share their layers' code."""
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
