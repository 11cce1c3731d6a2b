"""The rows of a model's embedding and head against the tokens of its tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuner.errors import UserError
from tuner.models.slices import hold_whole, whole_shape


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than a tokenizer's largest token id."""
    added: dict[str, int] = tokenizer.get_added_vocab()  # pyright: ignore[reportCallIssue, reportOptionalCall]
    return max(tokenizer.vocab_size, 1 + max(added.values(), default=-1))


def check_vocabulary(transformer: Any, size: int, where: str) -> None:
    """UserError where the tokenizer has tokens that the embedding has no row for."""
    rows = whole_shape(transformer.get_input_embeddings().weight)[0]
    if size > rows:
        raise UserError(
            f"{where}: its tokenizer has {size:,} tokens and its embedding {rows:,} rows; write "
            "model.resize_embeddings=true to train with new rows, or take the added tokens out of the tokenizer"
        )


@torch.no_grad()
def grow_embeddings(
    transformer: PreTrainedModel, rows: int | None, tokenizer: PreTrainedTokenizerBase
) -> range:
    """Give the embedding and the language head so many rows, in place; returns the new ones.

    rows: None or fewer than there are: nothing changes. A new row is the mean of the others: at random, or at zero, a
    new token would be the most likely one after some contexts (Hewitt, 2021, "Initializing new word embeddings").
    Raises UserError for more rows than the tokenizer has tokens: they are not those of its training.
    """
    embedding: Any = transformer.get_input_embeddings()
    old = whole_shape(embedding.weight)[0]
    if rows is None or rows <= old:
        return range(0)
    if rows > vocabulary_size(tokenizer):
        raise UserError(
            f"tuner.json: base.embedding_rows is {rows:,}, and the tokenizer has {vocabulary_size(tokenizer):,} "
            "tokens; restore the folder"
        )
    layers = (embedding, transformer.get_output_embeddings())
    hold_whole(transformer, [layer for layer in layers if layer is not None])
    # forked: transformers draws the new rows at random first
    with torch.random.fork_rng(devices=_cuda_of(embedding.weight)):
        transformer.resize_token_embeddings(rows, mean_resizing=False)
    head: Any = transformer.get_output_embeddings()
    layers = [transformer.get_input_embeddings(), *([] if head is None else [head])]
    for weight in (part for layer in layers for part in (layer.weight, getattr(layer, "bias", None))):
        if weight is not None:
            weight.requires_grad_(False)
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)
    return range(old, rows)


def _cuda_of(weight: torch.Tensor) -> list[torch.device]:
    return [weight.device] if weight.is_cuda else []
