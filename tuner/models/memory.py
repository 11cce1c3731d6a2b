"""An estimate of the memory a run needs on one device, by counting; benchmarks/gpu measures it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tuner.losses.chunked_softmax import CHUNK_ELEMENTS
from tuner.models.adapters import is_adapted
from tuner.models.coverage import quantizable
from tuner.models.freeze import decoder_layers
from tuner.models.from_files import can_be_sliced
from tuner.models.load import Loaded, Precision
from tuner.models.roles import Roles, ScalarHead
from tuner.models.unwrap import unwrapped

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in 4 bit, its share of a block's 8-bit scale (64 weights) and of that scale's fp32 one (256 blocks)."""
_QUANTIZED_BYTES = {"nf4": NF4_BYTES, "int8": 1.0}
_PACKED_BYTES = {NF4_BYTES: 0.5, 1.0: 1.0}
"""Of a weight in so many bytes, what is not its share of scales."""


@dataclass(frozen=True)
class MemoryBudget:
    """The settings of a stage that decide how much memory its training steps need."""

    precision: Precision
    optimizer_bits: Literal[32, 8]
    tokens_per_pass: int
    gradient_checkpointing: bool
    adapter_dropout: float
    """Dropout of the adapter's inputs; 0 without an adapter."""
    language_head: bool
    """Whether logits are computed."""
    generates: bool = True
    """Whether a process generates answers, for which it holds the model whole."""
    shards: int = 1
    """Processes that hold the weights together, but for adapters."""
    row_processes: int = 1
    """Processes that compute a row together."""


@dataclass(frozen=True)
class Weights:
    """Memory of a model's frozen weights, and the number of its trained ones."""

    frozen_bytes: float
    """Memory of the frozen weights, quantized ones included."""
    trained: int
    """Number of trained weights."""
    embedding_bytes: int
    """Size of one number of the embedding: layers pass on hidden states in its dtype."""
    scales_bytes: float
    """Memory of the scales of quantized weights, a part of `frozen_bytes`."""

    @classmethod
    def of(cls, loaded: Loaded) -> Weights:
        """Count a model, also one on the meta device, where its quantization is recorded and not applied.

        Quantization holds frozen linear layers other than the head in 4 or 8 bit, every other weight in its dtype.
        """
        embedding = unwrapped(loaded.model).get_input_embeddings().weight
        frozen, scales = _frozen_bytes(loaded, loaded.model)
        return cls(frozen, _trained_in(loaded.model), embedding.element_size(), scales)


@dataclass(frozen=True)
class _Held:
    """What a process holds of a model, in bytes."""

    always: float
    """Weights, gradients and optimizer state of what it trains."""
    in_training: float
    """Beside them, its part of frozen weights."""
    gathered: float
    """What a pass gathers at a time, with its gradients."""
    whole: float
    """In place of the last two, where answers are generated: the model; else what is held while it is loaded."""


def peak_bytes(budget: MemoryBudget, models: Sequence[Loaded], cache: float = 0.0) -> float:
    """Estimated peak of a training step on one device, in bytes, without the CUDA context (about 0.5 GiB).

    models: all that are held, built on the meta device; the activations are those of the first. Weights, gradients
    and optimizer state are counted exactly; activations as those of one layer, plus each layer's input where gradient
    checkpointing keeps only that. cache: keys and values held while answers are generated, when there are no
    activations. With shards, a process holds in training its share, and what a pass gathers; any model whole while
    answers are generated, and some while they are loaded (`from_files.py`).
    """
    held = [_held(budget, loaded) for loaded in models]
    embedding_bytes = Weights.of(models[0]).embedding_bytes
    activations = _activation_bytes(budget, unwrapped(models[0].model).config, embedding_bytes)
    in_training = sum(part.in_training for part in held) + max(part.gathered for part in held)
    whole = sum(part.whole for part in held)
    return sum(part.always for part in held) + max(in_training + activations, whole + cache)


def _held(budget: MemoryBudget, loaded: Loaded) -> _Held:
    weights = Weights.of(loaded)
    frozen, scales = weights.frozen_bytes, weights.scales_bytes
    if budget.shards == 1:
        return _Held(weights.trained * _trained_bytes(budget), frozen, 0.0, frozen)
    frozen_share = scales + (frozen - scales) / budget.shards
    if is_adapted(loaded.model) or not weights.trained:
        gathered = _gathered_bytes(loaded)
        whole = frozen if budget.generates else _loading_bytes(loaded, frozen_share, budget.shards)
        return _Held(weights.trained * _trained_bytes(budget), frozen_share, gathered, whole)
    cast = _cast_bytes(budget)
    share = weights.trained * (_trained_bytes(budget) - cast) / budget.shards
    gathered = _gathered_bytes(loaded) + _gathered_in_training(loaded, cast)
    if not budget.gradient_checkpointing:  # the backward pass needs the casts of all layers
        gathered += weights.trained * cast
    # some frozen: it was not loaded in shards (load_model)
    is_whole = budget.generates or frozen > 0
    whole = frozen + 4 * weights.trained if is_whole else 0.0
    return _Held(share, frozen_share, gathered, whole)


def roles_bytes(budget: MemoryBudget, roles: Roles, cache: float = 0.0) -> float:
    """`peak_bytes` of a stage with several roles: every distinct model once, and the roles' own heads."""
    return peak_bytes(budget, roles.models, cache) + sum(_head_bytes(budget, head) for head in roles.heads)


def _frozen_bytes(loaded: Loaded, part: nn.Module) -> tuple[float, float]:
    """Memory of the frozen weights in a part of a model, and that of the scales among it."""
    size = _QUANTIZED_BYTES.get(loaded.base.quantization or "")
    quantized = set() if size is None else quantizable(loaded.model)
    frozen = scales = 0.0
    for weight in part.parameters():
        if weight.requires_grad:
            continue
        if size is not None and id(weight) in quantized:
            frozen += weight.numel() * size
            scales += weight.numel() * (size - _PACKED_BYTES[size])
        else:
            frozen += weight.numel() * weight.element_size()
    return frozen, scales


def _loading_bytes(loaded: Loaded, share: float, shards: int) -> float:
    """Memory of a frozen model while it is loaded: where processes read their parts, those, and the largest weight,
    which is whole until it is quantized; and fused experts, which are until the model is in shards."""
    config, quantization = loaded.transformer.config, loaded.base.quantization
    stored = getattr(config, "quantization_config", None) is not None
    if stored or not can_be_sliced(config, shards, in_4_bit=quantization == "nf4"):
        return _frozen_bytes(loaded, loaded.model)[0]
    base = [weight for weight in loaded.transformer.parameters() if not weight.requires_grad]
    experts = sum(weight.nbytes for weight in base if weight.ndim > 2)
    return share + experts * (1 - 1 / shards) + max(weight.nbytes for weight in base)


def _gathered_bytes(loaded: Loaded) -> float:
    """Memory of the weights in shards that a pass gathers at a time: those outside of layers, a layer and the next."""
    layers = [_frozen_bytes(loaded, layer) for layer in decoder_layers(loaded.model)[1]]
    total, scales = _frozen_bytes(loaded, loaded.model)
    of_layers = [frozen - scales for frozen, scales in layers]
    return total - scales - sum(of_layers) + 2 * max(of_layers)


def _gathered_in_training(loaded: Loaded, cast: int) -> float:
    """Memory of trained weights that a pass gathers at a time, with what is made of them.

    Those outside of layers, a layer and the next; of the first two also the gradients, once as the pass computes them
    and once as processes sum them, and autocast's copies.
    """
    layers = [_trained_in(layer) for layer in decoder_layers(loaded.model)[1]]
    outside = _trained_in(loaded.model) - sum(layers)
    return (outside + max(layers)) * (4 + 4 + 4 + cast) + max(layers) * 4


def _trained_in(part: nn.Module) -> int:
    """Number of trained weights in a part of a model."""
    return sum(weight.numel() for weight in part.parameters() if weight.requires_grad)


def _trained_bytes(budget: MemoryBudget) -> int:
    """Bytes per trained weight: the weight and its gradient in fp32, the optimizer's two moments, autocast's copy."""
    moments = 2 if budget.optimizer_bits == 8 else 8
    return 4 + 4 + moments + _cast_bytes(budget)


def _cast_bytes(budget: MemoryBudget) -> int:
    """Bytes of autocast's copy of a trained weight."""
    return 2 if budget.precision == "bf16" else 0


def _head_bytes(budget: MemoryBudget, head: ScalarHead) -> int:
    return head.weight.numel() * (_trained_bytes(budget) if head.weight.requires_grad else 4)


def _activation_bytes(budget: MemoryBudget, shape: Any, embedding_bytes: int) -> float:
    plain = 2 if budget.precision == "bf16" else 4
    tokens, layers = -(-budget.tokens_per_pass // budget.row_processes), shape.num_hidden_layers
    # kept by one layer for its backward pass: two norms' and two blocks' in- and outputs, q, k, v, and the MLP's three
    layer = tokens * plain * (10 * shape.hidden_size + 4 * shape.intermediate_size)
    if budget.adapter_dropout > 0:  # the adapters' own inputs, in fp32 after dropout
        layer += tokens * 4 * (4 * shape.hidden_size + shape.intermediate_size)
    inputs = layers * tokens * shape.hidden_size * embedding_bytes
    activations = layer + inputs if budget.gradient_checkpointing else layers * layer
    logits = 0
    if budget.language_head:  # a chunk of logits and their gradient in fp32, and the product before the cast
        logits = min(CHUNK_ELEMENTS, tokens * shape.vocab_size) * (4 + 4 + plain)
    return activations + logits
