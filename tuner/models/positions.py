"""How far a model's positions go: learned ones to their last, others as far as it was trained, scaling included."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from tuner.errors import UserError
from tuner.models.rope import check_cached_length, longest_cached, reach
from tuner.models.unwrap import unwrapped

_LEARNED = re.compile(r"(^|\.)(wpe|\w*embed_positions|positions?_embeddings?|pos_embed\w*)(\.weight)?$")
"""Tables of positions in transformers' language models: weights, or buffers of sines and cosines."""


@dataclass(frozen=True)
class Positions:
    """Lengths of rows, in tokens, that a model can compute and that it was trained for; None: no such length."""

    limit: int | None
    trained: int | None

    @classmethod
    def of(cls, transformer: Any) -> Positions:
        """Of a model, which may be on the meta device."""
        return cls(_rows_of_tables(transformer), reach(transformer.config))


def check_generated_length(transformer: Any, length: int) -> None:
    """Raise UserError where prompts and answers of up to `length` tokens together cannot be generated."""
    check_length(transformer, length, "; lower the maximum length of prompts or max_new_tokens")
    check_cached_length(transformer.config, length)


def longest_row(transformer: Any) -> int | None:
    """Most tokens of prompt and answer together that a model was made for; None where nothing says."""
    positions = Positions.of(transformer)
    bounds = (positions.limit, positions.trained, longest_cached(transformer.config))
    return min((bound for bound in bounds if bound is not None), default=None)


def check_length(model: Any, length: int, what_to_do: str) -> None:
    """Raise UserError where rows of `length` tokens are longer than a model's learned positions go."""
    transformer = unwrapped(model)
    if "_position_limit" not in vars(
        transformer
    ):  # walking all weights takes longer than a small model's pass
        vars(transformer)["_position_limit"] = Positions.of(transformer).limit
    limit = vars(transformer)["_position_limit"]
    if limit is not None and length > limit:
        raise UserError(
            f"rows of up to {length:,} tokens: {type(transformer).__name__} has learned positions for {limit:,} "
            f"tokens{what_to_do}"
        )


def _rows_of_tables(model: nn.Module) -> int | None:
    """Positions of the smallest table that is indexed by position; None where they are computed (rotary, ALiBi)."""
    rows: list[int] = []
    for name, table in itertools.chain(model.named_parameters(), model.named_buffers()):
        if _LEARNED.search(name) and table.ndim == 2:
            owner = model.get_submodule(name.rpartition(".")[0])
            # OPT's table begins with two unused rows
            rows.append(table.shape[0] - getattr(owner, "offset", 0))
    return min(rows, default=None)
