"""An estimate of the memory a run needs on one device, by counting; benchmarks/gpu measures it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tuner.config import PPO, SFT, PackedConfig
from tuner.losses.chunked_softmax import CHUNK_ELEMENTS

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in 4 bit, its share of a block's 8-bit scale (64 weights) and of that scale's fp32 one (256 blocks)."""


@dataclass(frozen=True)
class Weights:
    """How many weights a model has, by what becomes of them."""

    linear: int
    """Frozen, in linear layers other than the head: what quantisation holds in 4 or 8 bit."""
    other: int
    """Frozen, elsewhere: embeddings, head, norms."""
    trained: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> Weights:
        """Count a model, also one on the meta device."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        linear = {
            id(module.weight)
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        in_linear = sum(parameter.numel() for parameter in frozen if id(parameter) in linear)
        return cls(
            linear=in_linear,
            other=sum(parameter.numel() for parameter in frozen) - in_linear,
            trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        )


def peak_bytes(
    config: PackedConfig | PPO, shape: Any, weights: Weights, quantization: str | None, cache: float = 0.0
) -> float:
    """Estimated peak of a training step on one device, in bytes, without the CUDA context (about 0.5 GiB).

    Weights, gradients and optimiser state are counted exactly; activations as those of one layer, plus each
    layer's input where gradient checkpointing keeps only that. cache: keys and values held while answers are
    generated, when there are no activations.
    """
    plain = 2 if config.precision == "bf16" else 4
    quantised = {None: plain, "nf4": NF4_BYTES, "int8": 1}[quantization]
    moments = 2 if config.optimizer.bits == 8 else 8
    copies = 2 if config.precision == "bf16" else 0  # autocast keeps trained weights in bf16 over a pass
    state = weights.linear * quantised + weights.other * plain + weights.trained * (4 + 4 + moments + copies)
    tokens, layers = config.tokens_per_pass, shape.num_hidden_layers
    # kept by one layer for its backward pass: two norms' and two blocks' in- and outputs, q, k, v, and the MLP's three
    layer = tokens * plain * (10 * shape.hidden_size + 4 * shape.intermediate_size)
    if config.adapter is not None:  # the adapters' own inputs, cast and perhaps dropped out
        layer += tokens * 4 * (4 * shape.hidden_size + shape.intermediate_size) * (config.adapter.dropout > 0)
    stream = plain if weights.linear else 4  # layers hand on what the embedding is held in
    inputs = layers * tokens * shape.hidden_size * stream
    activations = layer + inputs if config.gradient_checkpointing else layers * layer
    logits = 0  # a reward model has none
    if isinstance(config, SFT | PPO):
        logits = min(CHUNK_ELEMENTS, tokens * shape.vocab_size) * (4 + 4 + plain)
    return state + max(activations + logits, cache)
