"""The next token of every row. Shapes: B rows, V vocabulary, K the likeliest tokens.

Each number that decides is the row's own, so that batching, chunks, ranks and resuming change no answer.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LIKELIEST = (128, 1024)
"""How many tokens a nucleus is looked for in, in turn, before the whole vocabulary is sorted: of 49,152 tokens and 32
rows these take 2.4, 19 and 190 ms on one CPU core, and a nucleus seldom has a hundred."""


def uniforms(seed: int, step: int, places: Sequence[int], count: int) -> np.ndarray:
    """The numbers in [0, 1) that sampling turns into tokens, float64 [len(places), count].

    Each row is a function of (seed, step, its place, token) alone. places: numbers of the prompts in their step.
    """
    rows = [np.random.default_rng((seed, step, int(place))).random(count) for place in places]
    return np.stack(rows) if rows else np.empty((0, count))


def choose(
    logits_BV: Tensor, temperature: float, top_p: float = 1.0, uniform_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token of every row, int64 [B], and its log-probability at the temperature without top_p, fp32 [B].

    Temperature 0 takes the likeliest token, with the log-probability at temperature 1. Else the nucleus is cut
    (Holtzman et al., 2020) and the token is the first in vocabulary order whose cumulated probability exceeds
    uniform_B (float64) of the whole: inverse CDF, in float64.
    """
    probabilities_BV = (logits_BV.float() / (temperature or 1.0)).softmax(dim=-1)
    if temperature == 0:
        tokens_B = logits_BV.argmax(dim=-1)
    else:
        assert uniform_B is not None
        kept_BV = probabilities_BV.double()
        if top_p < 1:
            kept_BV.masked_fill_(~nucleus(probabilities_BV, top_p), 0)
        cumulated_BV = kept_BV.cumsum_(dim=-1)
        threshold_B1 = uniform_B[:, None] * cumulated_BV[:, -1:]
        tokens_B = torch.searchsorted(cumulated_BV, threshold_B1, right=True)[:, 0]
        # logits that are no numbers: their log-probability tells, a token outside the vocabulary would crash
        tokens_B.clamp_(max=logits_BV.shape[-1] - 1)
    return tokens_B, probabilities_BV.gather(-1, tokens_B[:, None])[:, 0].log()


def nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """Which tokens have less than top_p before them, from the likeliest down; equals in vocabulary order. bool [B, V].

    Ties are the rule, not the exception, where logits were bf16.
    """
    largest_BK, kept_BK = _kept_of_largest(probabilities_BV, top_p)
    smallest_B1 = largest_BK.gather(-1, kept_BK.sum(dim=-1, keepdim=True).clamp(min=1) - 1)
    places_B1 = (kept_BK & (largest_BK == smallest_B1)).sum(dim=-1, keepdim=True)
    tied_BV = probabilities_BV == smallest_B1
    return (probabilities_BV > smallest_B1) | (
        tied_BV & (tied_BV.cumsum(dim=-1, dtype=torch.int32) <= places_B1)
    )


def _kept_of_largest(probabilities_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """So many of the largest probabilities that all nuclei end among them, and which of them are kept, bool [B, K]."""
    vocabulary = probabilities_BV.shape[-1]
    for count in LIKELIEST:
        if count < vocabulary:
            largest_BK = probabilities_BV.topk(count).values
            kept_BK = _kept(largest_BK, top_p)
            if not bool(kept_BK[:, -1].any()):
                return largest_BK, kept_BK
    largest_BV = probabilities_BV.sort(descending=True).values
    return largest_BV, _kept(largest_BV, top_p)


def _kept(largest_BK: Tensor, top_p: float) -> Tensor:
    """In float64, where the order of summation, which differs between devices and widths, decides nothing."""
    return largest_BK.double().cumsum(dim=-1) - largest_BK < top_p
