"""What a forward and backward pass holds, counted from a model's modules: what autograd saves, and what is in flight.

Every rule says which operation keeps which value; benchmarks/plan_memory.py counts the same in real passes.
Sizes in bytes, or in bytes per token of the row where a name says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tuner.losses.chunked_softmax import CHUNK_ELEMENTS, PRODUCT_ROWS
from tuner.models.adapter_kinds import LINEAR
from tuner.models.adapters import belongs_to

TRL_TILE = 4_096, 32_768
"""Tokens and vocabulary entries of the tile in which TRL computes log-probabilities, whatever the vocabulary (TRL 1.16,
trl/kernels/chunked_logprob.py); its kernels on CUDA hold nothing beside it."""
LAST_PROJECTIONS = ("o_proj", "down_proj", "out_proj", "wo", "w2", "fc2", "c_proj", "dense", "dense_4h_to_h")
"""Names of the projections that end a block; the others of a block share its input."""


@dataclass(frozen=True)
class Arithmetic:
    """How a pass computes, as far as it decides what is held."""

    product: int
    """Bytes of a number in matrix products."""
    stream: int
    """Bytes of a number of the hidden states between layers: the embedding's dtype."""
    quantized: bool
    """Whether the base's linear layers are in 4 or 8 bit."""
    dropout: float
    """Dropout of the adapters' inputs."""
    padded_to: int = 0
    """Length of the rows of a padded batch (DPO, KTO), whose attention takes a mask; 0: packed rows."""

    tiled: float = 1.0
    """Share of a row's tokens for which an MLP is computed at a time (`tiled_mlp.py`)."""

    inputs_leave: bool = False
    """Whether a layer that is computed again lets its input go once its norm has a copy in fp32 (`offload.py`)."""

    @property
    def by_kernel(self) -> bool:
        """Whether attention is computed by kernels for packed rows, which take key heads once."""
        return self.product == 2 and not self.padded_to


@dataclass(frozen=True)
class Projection:
    """A linear layer of a block: width of its input, and who needs that input in the backward pass."""

    width: int
    out: int
    weights: int
    trained: bool
    """Whether its own weight is trained."""
    rank: int
    """Rank of its adapter, 0 without one."""
    of_experts: bool = False
    """Whether it stands for fused experts."""

    @property
    def needs_input(self) -> bool:
        return self.trained or self.rank > 0

    def copies_input(self, how: Arithmetic, held_in: int) -> bool:
        """Whether it keeps a copy of its input, which the others of its block do not share. held_in: its dtype's bytes.

        Dropout makes one, and so does autocast, for each layer by itself, of an input in fp32. Of an unquantized base
        peft casts the adapter's input to fp32 first, so that a bf16 input is copied as well.
        """
        if self.rank and (how.dropout or (not how.quantized and how.product == 2)):
            return True
        return self.needs_input and held_in != how.product

    def kept_per_token(self, how: Arithmetic, held_in: int) -> float:
        """Bytes per token that it keeps beside an input that is shared: its copy, dropout's mask, the adapter's middle.

        The mask has a byte for each number.
        """
        kept = self.width * how.product if self.copies_input(how, held_in) else 0.0
        if self.rank:
            kept += self.rank * how.product + (self.width if how.dropout else 0)
        return kept


@dataclass(frozen=True)
class LayerMemory:
    """What one decoder layer keeps for its backward pass, in bytes per token, by kind of value."""

    norms: float
    """Of each norm its input in fp32 (a copy, where hidden states are in bf16), and where it is trained its result."""
    attention: float
    """Queries, keys, values and output, and in fp32 the logarithm of each row's sum."""
    mlp: float
    """Inputs and output of the activation function, and of the product with the gate."""
    inputs: float
    """Inputs of the projections that are trained or have an adapter."""
    products: float
    """What selective recomputation keeps: results of linear layers, but of an adapter's second factors, and of
    attention with its sums."""
    in_flight: float
    """Beside them, in the backward pass or at the end of the forward pass: what is computed and not kept."""
    forward: float
    """In a forward pass without gradients, at its widest place."""
    largest: int
    """Weights of its largest projection."""

    @property
    def kept(self) -> float:
        return self.norms + self.attention + self.mlp + self.inputs

    @classmethod
    def of(cls, layer: nn.Module, shape: Any, how: Arithmetic) -> LayerMemory:
        """shape: the model's configuration."""
        blocks = [block for block in (_projections(part, shape) for part in layer.children()) if block]
        attention, mlp = (blocks[0], blocks[-1]) if len(blocks) > 1 else (blocks[0], blocks[0])
        gated = sum(part.out for part in mlp[:-1]) > mlp[-1].width
        # the product (or the activation's result) is kept as the last projection's input, if that needs it
        inside = (3 if gated else 1) * mlp[-1].width * how.product
        inputs = sum(_inputs_per_token(block, how) for block in blocks)
        in_flight = _in_flight_per_token(mlp[-1], shape.hidden_size, how, ends_in_norm=_ends_in_norm(layer))
        if how.tiled < 1:  # a layer keeps the MLP's input; the rest is there while a tile goes backward
            hidden = shape.hidden_size * how.stream
            inside += _inputs_per_token(mlp, how)
            inputs += hidden - _inputs_per_token(mlp, how)
            # beside it the gradients of the MLP's result and of its input
            in_flight, inside = how.tiled * (in_flight - hidden + inside) + 2 * hidden, 0.0
            # or after it the norm before the MLP, as the gradient takes the place of the MLP's input
            gone = hidden if how.inputs_leave and how.stream < 4 else 0
            in_flight = max(in_flight, _norm_in_flight(shape.hidden_size) - gone)
        return cls(
            norms=sum(_norm_per_token(name, norm, attention, how) for name, norm in _norms(layer)),
            attention=_attention_per_token(attention, shape, how),
            mlp=inside,
            inputs=inputs,
            products=_products_per_token(blocks, shape, how),
            in_flight=in_flight,
            forward=_forward_per_token(mlp, shape.hidden_size, how),
            largest=max(part.weights for block in blocks for part in block),
        )


def _projections(block: nn.Module, shape: Any) -> list[Projection]:
    """The linear layers of a block, the one that ends it last; of fused experts those that a token passes."""
    projections: list[tuple[str, Projection]] = []
    for name, module in block.named_modules():
        if isinstance(module, LINEAR) and belongs_to(f"{name}.weight", None):
            plain = name.removesuffix(".base_layer")
            rank = _rank(block.get_submodule(plain)) if plain != name else 0
            rows, columns = module.weight.shape
            if not isinstance(module, nn.Linear):  # transposed
                rows, columns = columns, rows
            trained = module.weight.requires_grad
            projections.append(
                (plain.rpartition(".")[2], Projection(columns, rows, rows * columns, trained, rank))
            )
    if experts := [weight for weight in block.parameters() if weight.ndim > 2]:
        projections += _experts(experts, shape)
    return [part for _, part in sorted(projections, key=lambda item: item[0] in LAST_PROJECTIONS)]


def _experts(weights: list[nn.Parameter], shape: Any) -> Iterator[tuple[str, Projection]]:
    """Fused experts as one wide MLP: a token passes `num_experts_per_tok` of them."""
    count = getattr(shape, "num_experts_per_tok", 1)
    width = count * (getattr(shape, "moe_intermediate_size", None) or shape.intermediate_size)
    size, trained = max(weight.numel() for weight in weights), weights[0].requires_grad
    yield "gate_up_proj", Projection(shape.hidden_size, 2 * width, size, trained, 0, of_experts=True)
    yield "down_proj", Projection(width, shape.hidden_size, size, trained, 0, of_experts=True)


def _rank(adapted: Any) -> int:
    """Rank of a peft layer's adapter that is trained, or else of its first."""
    ranks = [part.weight.shape[0] for part in getattr(adapted, "lora_A", {}).values()]
    return max(ranks, default=0)


def _inputs_per_token(block: list[Projection], how: Arithmetic) -> float:
    """Bytes per token of the inputs of a block's projections.

    The first ones share the norm's result, in the hidden states' dtype; each keeps it as it is, or a copy of its own.
    The last one takes what products have made.
    """
    *first, end = block
    last = how.product
    kept = sum(part.kept_per_token(how, how.stream) for part in first) + end.kept_per_token(how, last)
    if any(part.needs_input and not part.copies_input(how, how.stream) for part in first):
        kept += first[0].width * how.stream
    if end.needs_input and not end.copies_input(how, last):
        kept += end.width * last
    return kept


def _norms(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and weight is not None and weight.ndim == 1:
            yield name.rpartition(".")[2], module


def _norm_per_token(name: str, norm: Any, attention: list[Projection], how: Arithmetic) -> float:
    """Its input in fp32; a trained one also what its weight multiplies. Norms of heads are as wide as all heads."""
    width: int = norm.weight.numel()
    held_in = how.stream
    of_heads = {"q": 0, "k": 1}.get(name[:1])
    if of_heads is not None and len(attention) > 2 and width < attention[0].width:
        width, held_in = attention[of_heads].out, how.product
    if "Gemma" in type(norm).__name__:  # which multiplies in fp32
        held_in = 4
    return width * (4 + (held_in if norm.weight.requires_grad else 0))


def _attention_per_token(attention: list[Projection], shape: Any, how: Arithmetic) -> float:
    """Of packed rows by kernel: queries, keys, values, output and sums. Other attention takes keys and values repeated
    for every query head; packed, it joins the segments' outputs to one more; padded, it keeps its mask as numbers."""
    heads: int = shape.num_attention_heads
    width = attention[-1].width
    keys = width // heads * (getattr(shape, "num_key_value_heads", None) or heads)
    kept = 2 * width * how.product + 4 * heads
    if how.by_kernel:
        # the output is also the last projection's input, which counts it where it shares it
        shared = width * how.product if _shares(attention[-1], how) else 0
        return kept + 2 * keys * how.product - shared
    return kept + 2 * width * how.product + how.padded_to * how.product


def _products_per_token(blocks: list[list[Projection]], shape: Any, how: Arithmetic) -> float:
    """MLPs in tiles keep none."""
    attention, *others = blocks
    kept = [part for block in ([attention] if how.tiled < 1 else [attention, *others]) for part in block]
    results = sum((part.out + part.rank) * how.product for part in kept if not part.of_experts)
    return results + attention[-1].width * how.product + 4 * shape.num_attention_heads


def _shares(last: Projection, how: Arithmetic) -> bool:
    return last.needs_input and not last.copies_input(how, how.product)


def _forward_per_token(mlp: list[Projection], width: int, how: Arithmetic) -> float:
    """Before the MLP's product: the gate, its activation, the other factor and the product (of a projection with an
    adapter on a quantized base also its copy before the adapter's part is added), and four hidden states: the layer's
    input, those before the MLP, and the norm's result in two dtypes."""
    values = 4 if len(mlp) > 2 else 2
    # of an unquantized base peft casts the adapter's input to fp32
    cast = 4 * width if mlp[0].rank and not how.quantized and how.product == 2 else 0
    result = width * how.stream if how.tiled < 1 else 0
    return how.tiled * (values * mlp[-1].width * how.product + cast) + 4 * width * how.stream + result


def _ends_in_norm(layer: nn.Module) -> bool:
    """Whether a norm stands behind the MLP, as in Gemma 2 and 3: the last of four."""
    return sum("norm" in name for name, _ in layer.named_children()) > 2


def _in_flight_per_token(last: Projection, width: int, how: Arithmetic, *, ends_in_norm: bool) -> float:
    """At a layer's widest place, the MLP's last projection, beside the gradient of the layer's result.

    In the backward pass the gradients of the product and of a factor. In the forward pass of an adapter on an
    unquantized base the product with its copies in fp32, before and after dropout, and hidden states: those before the
    MLP, its norm's result, and the projection's own. A norm at a layer's end goes backward first.
    """
    backward = 2 * last.width * how.product
    if ends_in_norm:
        backward = max(backward, _norm_in_flight(width))
    if last.rank and not how.quantized and how.product == 2:
        copies = last.width * (how.product + 4 + (4 if how.dropout else 0))
        backward = max(backward, copies + width * (2 * how.stream + how.product))
    return backward + width * how.stream


def _norm_in_flight(width: int) -> float:
    """As a norm goes backward, five values in fp32: gradients by its result, its input and its mean square, and factors
    of these."""
    return 5 * width * 4.0


@dataclass(frozen=True)
class HeadMemory:
    """What the language head takes at the end of a forward pass, in bytes."""

    logits: float
    """A chunk of logits: in fp32, and in the dtype of products where that is another."""
    hidden: float
    """The hidden states it takes, in both dtypes, and their gradient."""
    matrix: float
    """Of a trained head: its copy in the dtype of products, and a part of its gradient."""
    gradient: float
    """Of a trained head: this pass's gradient, beside that of the passes before."""

    @classmethod
    def of(cls, transformer: Any, tokens: float, how: Arithmetic, *, plain: bool) -> HeadMemory:
        """tokens: those with a loss. plain: whether the head is a matrix alone, whose loss is fused."""
        shape = transformer.config
        vocabulary, width = shape.vocab_size, shape.hidden_size
        head = transformer.get_output_embeddings()
        trained = head is not None and head.weight.requires_grad
        elements = min(CHUNK_ELEMENTS, tokens * vocabulary)
        cast = how.product if how.product != how.stream else 0
        if how.padded_to:  # TRL's, which sums the hidden states' gradient in fp32
            tile = min(tokens, TRL_TILE[0]) * TRL_TILE[1] * how.product
            hidden = tokens * width * (how.stream + cast + 4.0)
            return cls(tile, hidden, matrix=0.0, gradient=4.0 * vocabulary * width if trained else 0.0)
        # another head is computed by autograd: logits, in fp32, their log-softmax, and its gradient
        per_element = (4 + (how.product if how.product == 2 else 0)) if plain else 12 + how.product
        copies = (min(vocabulary, PRODUCT_ROWS) + vocabulary) * width * how.product if how.product == 2 else 0
        return cls(
            logits=elements * per_element,
            hidden=tokens * width * (how.stream + cast + how.product),
            matrix=float(copies) if trained else 0.0,
            gradient=4.0 * vocabulary * width if trained else 0.0,
        )
