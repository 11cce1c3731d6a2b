"""Reading prompts into the cache: packed end to end in passes of bounded size, and long ones in pieces.

Shapes: L rows, T tokens of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tuner.data.batch import make_batch
from tuner.models import varlen
from tuner.models.kv_cache import RowCache
from tuner.models.segment_rope import depends_on_length, part_positions

TOKENS_PER_PASS = 16_384


def prefill(
    transformer: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    places: np.ndarray,
    cache: RowCache,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> Tensor:
    """Write rows of tokens to these places of the cache (int64 [L]); returns the logits at their last tokens, [L, V].

    A row of more than tokens_per_pass tokens is read in pieces, each attending to what the cache holds of those before
    it; a model whose positions depend on the length of what it reads, and are not made exact here, reads it whole.
    """
    lengths = [len(row) for row in rows]
    largest = max(lengths) if depends_on_length(transformer) else tokens_per_pass
    logits: list[Tensor] = []
    with varlen.attention(transformer, varlen.NAME):
        for group in _passes(lengths, tokens_per_pass):
            pieces = range(0, lengths[group[0]], largest) if len(group) == 1 else (0,)
            logits_LV = torch.empty(0)
            for start in pieces:
                parts = [rows[row][start : start + largest] for row in group]
                logits_LV = _read(transformer, parts, start, lengths[group[0]], places[group], cache)
            logits.append(logits_LV)
    return torch.cat(logits)


def _read(
    transformer: PreTrainedModel,
    parts: Sequence[Sequence[int]],
    start: int,
    whole: int,
    places: np.ndarray,
    cache: RowCache,
) -> Tensor:
    """A pass over rows, or over a piece of a row of `whole` tokens that begins at `start`; logits of last tokens."""
    samples = [np.asarray(part, dtype=np.int32) for part in parts]
    batch = make_batch([(tokens, np.zeros(len(tokens), np.float32)) for tokens in samples]).to(
        transformer.device
    )
    positions_1T = batch.positions_T[None]
    if len(parts[0]) < whole:
        positions_T = torch.arange(whole, device=transformer.device)
        positions_1T = part_positions(positions_T, start, start + len(parts[0]))
    starts = np.full(len(parts), start)
    with cache.packed(places, starts, starts + [len(part) for part in parts]):
        output = transformer(
            input_ids=batch.tokens_T[None],
            position_ids=positions_1T,
            past_key_values=cache,
            use_cache=True,
            # else logits of every prompt token over the vocabulary
            logits_to_keep=batch.offsets[1:].long() - 1,
            **varlen.segment_arguments(batch),
        )
    return output.logits[0]


def _passes(lengths: Sequence[int], tokens_per_pass: int) -> Iterator[np.ndarray]:
    """Consecutive rows whose tokens together fit a pass; a longer row is alone."""
    start = tokens = 0
    for row, length in enumerate(lengths):
        if tokens and tokens + length > tokens_per_pass:
            yield np.arange(start, row)
            start, tokens = row, 0
        tokens += length
    yield np.arange(start, len(lengths))
