"""Which weights an adapter and a quantization cover, and which they leave out, counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from tuner.models.adapter_kinds import LINEAR, SCORE, short_name
from tuner.models.adapters import adapted_weights, belongs_to, is_adapted, is_meta
from tuner.models.freeze import plain_name
from tuner.models.quantization import quantized_layers
from tuner.models.slices import whole_shape
from tuner.models.unwrap import unwrapped


def coverage(model: nn.Module, quantization: str | None) -> dict[str, str]:
    """ "adapter" and the quantization's name -> a sentence on the matrices they cover and those they do not.

    quantization: that of the base, which is not applied on the meta device.
    """
    covers: dict[str, Callable[[Any], bool]] = {}
    if is_adapted(model):
        adapted = {id(weight) for weight in adapted_weights(model)}
        covers["adapter"] = lambda weight: id(weight) in adapted
    if quantization is not None:
        layers = [layer.weight for _, layer in quantized_layers(model)]
        quantized = quantizable(model) if is_meta(model) else {id(weight) for weight in layers}
        covers[quantization] = lambda weight: id(weight) in quantized
    return {name: _sentence(model, covered) for name, covered in covers.items()}


def expert_notes(model: nn.Module, quantization: str | None) -> list[str]:
    """For a mixture of fused experts, the sentences of `coverage`: experts are in no linear layer."""
    if not any(weight.ndim == 3 for weight in _matrices(model).values()):
        return []
    how = {"adapter": " (experts get one by adapter.target_parameters)"}
    return [f"{name} {text}{how.get(name, '')}" for name, text in coverage(model, quantization).items()]


def _sentence(model: nn.Module, covered: Callable[[Any], bool]) -> str:
    counts: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for name, weight in _matrices(model).items():
        group = counts[covered(weight)]
        kind = short_name(name)
        group[kind] = group.get(kind, 0) + num_weights(weight)
    parts = {
        is_covered: ", ".join(f"{kind} ({count:,})" for kind, count in sorted(group.items()))
        for is_covered, group in counts.items()
    }
    total = sum(sum(group.values()) for group in counts.values())
    return f"on {sum(counts[True].values()):,} of {total:,} weights of matrices; without: {parts[False] or 'none'}"


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's weights of two and more dimensions, and packed ones, by plain name."""
    packed = {id(layer.weight) for _, layer in quantized_layers(model)}
    return {
        re.sub(r"\.(original_module|token_adapter)", "", plain_name(name)): weight
        for name, weight in model.named_parameters()
        if belongs_to(name, None) and (weight.ndim > 1 or id(weight) in packed)
    }


def quantizable(model: nn.Module) -> set[int]:
    """Ids of the weights of linear layers, which quantization holds in 4 or 8 bit, but for heads and adapters."""
    head = unwrapped(model).get_output_embeddings()
    of_head = set() if head is None else {id(weight) for weight in head.parameters()}
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, LINEAR)
        and id(module.weight) not in of_head
        and belongs_to(f"{name}.weight", None)
        and SCORE not in name.split(".")
    }


def num_weights(weight: Any) -> int:
    """Number of weights of a parameter: of a 4-bit one, those that its bytes hold."""
    state = getattr(weight, "quant_state", None)
    return (whole_shape(weight) if state is None else state.shape).numel()
