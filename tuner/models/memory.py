"""A plan of the memory a run needs on one device, counted in named terms; benchmarks/plan_memory.py checks it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from tuner.config.training import Recomputation
from tuner.models.adapters import is_adapted
from tuner.models.coverage import quantizable
from tuner.models.freeze import decoder_layers
from tuner.models.from_files import can_be_sliced
from tuner.models.kv_cache import MOST_ROWS, numbers_per_token
from tuner.models.load import Loaded, Precision
from tuner.models.pass_memory import LayerMemory
from tuner.models.pass_moments import arithmetic, pass_moments
from tuner.models.roles import Roles, ScalarHead
from tuner.models.sampling import BYTES_PER_LOGIT
from tuner.models.tiled_mlp import mlp_of
from tuner.models.unwrap import unwrapped

BUCKET_BYTES = 4 * 2**24
"""Of the flat buffer in which processes sum gradients (`Devices.sum_gradients`), unless one weight is larger."""
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
    gradient_checkpointing: Recomputation
    adapter_dropout: float
    """Dropout of the adapter's inputs; 0 without an adapter."""
    language_head: bool
    """Whether logits are computed."""
    generates: bool = True
    """Whether a process generates answers, for which it holds the model whole."""
    generated: int = 0
    """Tokens whose keys and values are held while answers are generated."""
    generated_rows: int = 0
    """Answers that are generated side by side."""
    prefilled: int = 0
    """Tokens of their prompts in one pass."""
    shards: int = 1
    """Processes that hold the weights together, but for adapters."""
    row_processes: int = 1
    """Processes that compute a row together."""
    passes_share_casts: bool = False
    """Whether a step's passes are made within one autocast, so that they share the copies it makes of trained weights.
    Backward passes but the first then hold these copies' gradients to their end: autograd takes the steps of a graph
    by their age, and the copies are as old as the first pass."""
    padded_to: int = 0
    """Length of the rows of a padded batch; 0: packed rows."""
    mlp_tile: int | None = None
    """Tokens for which an MLP is computed at a time; None: all of the row."""

    @property
    def tokens(self) -> int:
        """Of a pass, those that one process computes."""
        return -(-self.tokens_per_pass // self.row_processes)

    @property
    def tiled(self) -> float:
        """The share of them for which an MLP is computed at a time."""
        return 1.0 if self.mlp_tile is None else min(1.0, self.mlp_tile / self.tokens)

    @property
    def product_bytes(self) -> int:
        """Bytes of a number in matrix products, and of keys and values."""
        return 2 if self.precision == "bf16" else 4

    @property
    def moment_bytes(self) -> int:
        """Bytes of the optimizer's two moments of a weight."""
        return 2 if self.optimizer_bits == 8 else 8


@dataclass(frozen=True)
class MemoryPlan:
    """The peak of a run's memory on one device, at the moment that needs most."""

    moment: str
    """When that is: "training", "update", "generation" or "loading"."""
    terms: Mapping[str, float] = field(default_factory=dict[str, float])
    """What is held then, in words -> bytes. They add up to the peak."""
    host: float = 0.0
    """Bytes of the host's memory, pinned, in which layers' inputs wait; no part of the peak."""

    @property
    def peak(self) -> float:
        """In bytes, without the CUDA context (about 0.5 GiB) and what the allocator loses between blocks."""
        return sum(self.terms.values())

    @classmethod
    def largest(cls, *moments: MemoryPlan) -> MemoryPlan:
        """The moment that needs most."""
        return max(moments, key=lambda moment: moment.peak)


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

    trained: float
    """Trained weights in fp32."""
    gradients: float
    optimizer: float
    copies: float
    """Autocast's copies of trained weights in bf16, of those that it casts: matrices of decoder layers."""
    frozen: float
    """Its part of frozen weights, in training."""
    gathered: float
    """What a pass gathers at a time, with its gradients."""
    whole: float
    """In place of the last two, where answers are generated: the model; else what is held while it is loaded."""


def memory_plan(
    budget: MemoryBudget,
    models: Sequence[Loaded],
    *,
    heads: Sequence[ScalarHead] = (),
    further: Mapping[str, float] | None = None,
) -> MemoryPlan:
    """The plan of a training step on one device.

    models: all that are held, built on the meta device; the activations are those of the first. heads: the roles' own.
    further: what else is held all the time, in bytes by name. With shards, a process holds in training its share, and
    what a pass gathers; any model whole while answers are generated, and some while they are loaded (`from_files.py`).
    """
    held = [_held(budget, loaded) for loaded in models]
    always = {
        "trained weights in fp32": sum(part.trained for part in held),
        "gradients": sum(part.gradients for part in held),
        "optimizer state": sum(part.optimizer for part in held),
        "roles' own heads": float(sum(_head_bytes(budget, head) for head in heads)),
        **(further or {}),
    }
    frozen = {
        "frozen weights": sum(part.frozen for part in held),
        "weights gathered for a layer": max(part.gathered for part in held),
    }
    # of several models, one at a time is in training, and another's copies go when its role is left
    copies = {"copies of trained weights in bf16": max(part.copies for part in held)}
    training = [
        MemoryPlan("training", always | frozen | copies | moment)
        for moment in pass_moments(budget, models[0], held[0].copies)
    ]
    update = MemoryPlan("update", always | frozen | {"gradients summed over processes": _bucket(models)})
    whole = {"frozen weights": sum(part.whole for part in held)}
    # between two steps, when there are no gradients
    between = {name: size for name, size in always.items() if name != "gradients"}
    generation = MemoryPlan(
        "generation" if budget.generates else "loading",
        between | whole | _generation_terms(budget, models[0]),
    )
    plan = MemoryPlan.largest(*training, update, generation)
    terms = {name: size for name, size in plan.terms.items() if size}
    return MemoryPlan(plan.moment, terms, _on_the_host(budget, models[0]))


def _on_the_host(budget: MemoryBudget, loaded: Loaded) -> float:
    if budget.gradient_checkpointing != "offload":
        return 0.0
    transformer = unwrapped(loaded.model)
    width = transformer.config.hidden_size * transformer.get_input_embeddings().weight.element_size()
    # torch's allocator of pinned memory rounds a block up to a power of two
    block = 2 ** math.ceil(math.log2(budget.tokens * width))
    return float(block * transformer.config.num_hidden_layers)


def _bucket(models: Sequence[Loaded]) -> float:
    """Of the buffer in which processes sum gradients; a weight larger than it has one of its own."""
    sizes = [
        weight.numel() for loaded in models for weight in loaded.model.parameters() if weight.requires_grad
    ]
    return float(max(min(4 * sum(sizes), BUCKET_BYTES), 4 * max(sizes, default=0)))


def _generation_terms(budget: MemoryBudget, loaded: Loaded) -> dict[str, float]:
    """What generating answers holds beside the weights: keys and values, and the larger of two: as prompts are read,
    what a layer computes; as tokens are drawn, probabilities of the rows, and a layer's keys once more as they are
    moved to a larger cache."""
    if not budget.generates or not budget.generated:
        return {}
    shape, how = unwrapped(loaded.model).config, arithmetic(budget, loaded)
    layers = decoder_layers(loaded.model)[1]
    computed = max(LayerMemory.of(layer, shape, how).forward for layer in layers)
    cache = budget.generated * numbers_per_token(shape) * float(budget.product_bytes)
    reading = {"a layer, as prompts are read": budget.prefilled * computed}
    drawing = {
        "keys of a layer, moved": cache / (2 * shape.num_hidden_layers),
        "probabilities of the next tokens": float(
            min(MOST_ROWS, budget.generated_rows) * shape.vocab_size * BYTES_PER_LOGIT
        ),
    }
    larger = max(reading, drawing, key=lambda terms: sum(terms.values()))
    return {"keys and values of answers": cache, **larger}


def _held(budget: MemoryBudget, loaded: Loaded) -> _Held:
    weights = Weights.of(loaded)
    frozen, scales = weights.frozen_bytes, weights.scales_bytes
    copies = 2.0 * _cast_in(loaded, tiled=budget.tiled < 1) if budget.precision == "bf16" else 0.0
    of_trained = [float(weights.trained * size) for size in (4, 4, budget.moment_bytes)]
    if budget.shards == 1:
        return _Held(*of_trained, copies=copies, frozen=frozen, gathered=0.0, whole=frozen)
    frozen_share = scales + (frozen - scales) / budget.shards
    if is_adapted(loaded.model) or not weights.trained:
        gathered = _gathered_bytes(loaded)
        whole = frozen if budget.generates else _loading_bytes(loaded, frozen_share, budget.shards)
        return _Held(*of_trained, copies=copies, frozen=frozen_share, gathered=gathered, whole=whole)
    cast = 2 if budget.precision == "bf16" else 0
    gathered = _gathered_bytes(loaded) + _gathered_in_training(loaded, cast)
    if not budget.gradient_checkpointing:  # the backward pass needs the casts of all layers
        gathered += weights.trained * cast
    # some frozen: it was not loaded in shards (load_model)
    is_whole = budget.generates or frozen > 0
    whole = frozen + 4 * weights.trained if is_whole else 0.0
    shares = [size / budget.shards for size in of_trained]
    return _Held(*shares, copies=0.0, frozen=frozen_share, gathered=gathered, whole=whole)


def _cast_in(loaded: Loaded, *, tiled: bool) -> int:
    """Number of trained weights of which autocast keeps a copy: matrices of layers, of several adapters those of the
    largest, as one is in use. Norms multiply in fp32, embeddings look up, the head casts its matrix by itself, and so
    do MLPs in tiles."""
    counts: dict[str, int] = {}
    layers = decoder_layers(loaded.model)[1]
    by_tile = {weight for layer in layers for weight in mlp_of(layer).parameters()} if tiled else set()
    for name, weight in layers.named_parameters():
        if weight.requires_grad and weight.ndim > 1 and weight not in by_tile:
            adapter = name.split(".")[-2] if "lora_" in name else ""
            counts[adapter] = counts.get(adapter, 0) + weight.numel()
    return counts.pop("", 0) + max(counts.values(), default=0)


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


def _head_bytes(budget: MemoryBudget, head: ScalarHead) -> int:
    return head.weight.numel() * (4 + 4 + budget.moment_bytes if head.weight.requires_grad else 4)


def roles_plan(budget: MemoryBudget, roles: Roles) -> MemoryPlan:
    """`memory_plan` of a stage with several roles: every distinct model once, and the roles' own heads."""
    return memory_plan(budget, roles.models, heads=roles.heads)
