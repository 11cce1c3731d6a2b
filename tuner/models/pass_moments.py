"""The moments of a forward and backward pass that may need most memory, and what is held at each beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from tuner.models.freeze import decoder_layers
from tuner.models.load import Loaded
from tuner.models.pass_memory import Arithmetic, HeadMemory, LayerMemory
from tuner.models.tiled_mlp import mlp_of
from tuner.models.unwrap import unwrapped

if TYPE_CHECKING:
    from tuner.models.memory import MemoryBudget


def pass_moments(budget: MemoryBudget, loaded: Loaded, copies: float) -> list[dict[str, float]]:
    """By name, in bytes: at the head; as the last layer goes backward; and the first. copies: of trained weights."""
    moments = _Moments(budget, loaded, copies)
    return [moments.at_head, moments.last_layer, moments.first_layer]


def arithmetic(budget: MemoryBudget, loaded: Loaded) -> Arithmetic:
    """How the passes of a model compute."""
    return Arithmetic(
        product=budget.product_bytes,
        stream=unwrapped(loaded.model).get_input_embeddings().weight.element_size(),
        quantized=loaded.base.quantization is not None,
        dropout=budget.adapter_dropout,
        padded_to=budget.padded_to,
        tiled=budget.tiled,
        inputs_leave=budget.gradient_checkpointing == "offload",
    )


class _Moments:
    def __init__(self, budget: MemoryBudget, loaded: Loaded, copies: float) -> None:
        self._budget, self._copies = budget, copies
        self._transformer = unwrapped(loaded.model)
        self._how, self._tokens = arithmetic(budget, loaded), budget.tokens
        self._layers = list(decoder_layers(loaded.model)[1])
        self._counts = [LayerMemory.of(layer, self._transformer.config, self._how) for layer in self._layers]
        self._largest = max(self._counts, key=lambda count: count.kept)

    @property
    def at_head(self) -> dict[str, float]:
        budget, how = self._budget, self._how
        # of inputs that go to the host the last layer's is left
        held = self._kept(1 if budget.gradient_checkpointing == "offload" else len(self._layers))
        if budget.gradient_checkpointing:
            held |= {"the last norm's input and result": self._last_norm}
        if not budget.language_head:
            return held
        head = HeadMemory.of(self._transformer, self._tokens, how, plain=_is_plain(self._transformer))
        return held | {
            "logits of a chunk": head.logits,
            "hidden states at the head": head.hidden,
            # of shards they are among what is gathered
            "the head's matrix in bf16": head.matrix if budget.shards == 1 else 0.0,
            "the head's second gradient": head.gradient if budget.shards == 1 else 0.0,
        }

    @property
    def last_layer(self) -> dict[str, float]:
        """As it goes backward, before all others, of which everything is kept."""
        matrix = _of_largest_matrix(
            self._largest.largest, self._how, trained=self._budget.shards == 1 and _trains(self._layers)
        )
        held = self._kept(len(self._layers))
        if self._budget.gradient_checkpointing:
            # what is kept of this one's products is among its activations
            held = self._kept(len(self._layers), len(self._layers) - 1) | self._of_one_layer
        return held | self._in_flight(matrix)

    @property
    def first_layer(self) -> dict[str, float]:
        """As it goes backward, after all others."""
        held = self._of_one_layer
        if self._budget.gradient_checkpointing:
            held = self._kept(1, 0) | held
        shared = self._budget.passes_share_casts
        # those of the layer in flight are not among them; none is cast to fp32 before the end
        waiting = self._copies * (1 - 1 / len(self._layers)) * shared
        trained = self._budget.shards == 1 and _trains(self._layers)
        matrix = _of_largest_matrix(self._largest.largest, self._how, trained=trained)
        if shared and _trains(self._layers):
            matrix = float(self._largest.largest * self._how.product)
        return held | {"gradients in bf16 that wait": waiting} | self._in_flight(matrix)

    def _kept(self, inputs: int, products: int | None = None) -> dict[str, float]:
        """What so many layers keep for their backward pass; products: of how many (None: of as many)."""
        recomputation = self._budget.gradient_checkpointing
        if not recomputation:
            return {
                "activations of all layers": self._tokens * sum(count.kept for count in self._counts)
                + self._last_norm
            }
        if recomputation == "offload":
            return {"inputs of layers on the device": min(2, inputs) * self._hidden}
        kept = {"inputs of all layers": inputs * self._hidden}
        if recomputation == "selective":
            counts = self._counts[: inputs if products is None else products]
            kept["products of all layers"] = self._tokens * sum(count.products for count in counts)
        return kept

    @property
    def _of_one_layer(self) -> dict[str, float]:
        return {"activations of one layer": self._tokens * self._largest.kept}

    def _in_flight(self, matrix: float) -> dict[str, float]:
        if self._how.tiled < 1:
            matrix += self._of_tiled_weights
        return {"gradients in flight": self._tokens * self._largest.in_flight + matrix}

    @property
    def _of_tiled_weights(self) -> float:
        """Of an MLP's trained weights in fp32 the sums of gradients, and a tile's, and their casts for it."""
        cast = self._how.product if self._how.product == 2 else 0
        trained = [
            sum(weight.numel() for weight in mlp_of(layer).parameters() if weight.requires_grad)
            for layer in self._layers
        ]
        return max(trained) * (4.0 + 4.0 + cast)

    @cached_property
    def _hidden(self) -> float:
        """Hidden states between two layers."""
        return float(self._tokens * self._transformer.config.hidden_size * self._how.stream)

    @cached_property
    def _last_norm(self) -> float:
        """The last norm's input and, where it is trained, its result."""
        norm = getattr(self._transformer.get_decoder(), "norm", None)
        trained = norm is not None and any(weight.requires_grad for weight in norm.parameters())
        width = self._tokens * self._transformer.config.hidden_size
        return width * (4.0 + (self._how.stream if trained else 0))


def _trains(layers: Sequence[nn.Module]) -> bool:
    """Whether whole matrices of layers are trained, and not adapters alone."""
    return any(
        weight.requires_grad and "lora_" not in name
        for layer in layers
        for name, weight in layer.named_parameters()
    )


def _of_largest_matrix(weights: int, how: Arithmetic, *, trained: bool) -> float:
    """Of the largest projection: its 4-bit weights, unpacked for a product; or its gradient, as the product gives it
    and in fp32."""
    if trained:
        return weights * (4.0 + (how.product if how.product == 2 else 0))
    return float(weights * how.product) if how.quantized else 0.0


def _is_plain(transformer: Any) -> bool:
    """Whether the head is a matrix alone, as `models/forward.py` asks it."""
    head = transformer.get_output_embeddings()
    return type(head) is nn.Linear and getattr(transformer.config, "final_logit_softcapping", None) is None
