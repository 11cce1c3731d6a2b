"""Sampling the next token of every row. Shapes: B rows, V vocabulary, K most likely tokens.

Each row depends on its own numbers alone, so that batching, chunks, ranks and resuming change no answer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST_LIKELY = (128, 1024)
"""Numbers of most likely tokens in which a nucleus is searched, in turn, before the whole vocabulary is sorted: with a
vocabulary of 49,152 and 32 rows these take 2.4, 19 and 190 ms on one CPU core, and a nucleus seldom has 100 tokens."""
ONE = 2**48
"""Probability 1 in fixed point. Integers add up to the same whatever the order, so no device's order of summation
decides a token; CUDA has no deterministic cumulative sum of floating-point numbers. A product with a uniform number
below 1 stays below it in float64."""

BYTES_PER_LOGIT = 24
"""Most bytes that `choose` holds for each row and token: logits as the head gives them, in fp32 at the temperature,
probabilities, these in fixed point and the product before, and a mask."""


class Forbidden(NamedTuple):
    """Tokens that may not be sampled."""

    ids: Tensor
    """int64."""
    rows_B: Tensor
    """Whether a row may not have them, bool."""


def uniforms(seed: int, step: int, places: Sequence[int], count: int) -> np.ndarray:
    """Uniform noise in [0, 1) for sampling, float64 [len(places), count].

    Each number is a function of (seed, step, place, token) alone. places: indices of the prompts in their step.
    """
    rows = [np.random.default_rng((seed, step, int(place))).random(count) for place in places]
    return np.stack(rows) if rows else np.empty((0, count))


def choose(
    logits_BV: Tensor,
    temperature: float,
    top_p: float = 1.0,
    uniform_B: Tensor | None = None,
    *,
    top_k: int | None = None,
    forbidden: Forbidden | None = None,
) -> tuple[Tensor, Tensor]:
    """Token of every row, int64 [B], and its log-probability at the temperature over the whole vocabulary, fp32 [B].

    Temperature 0 takes the most likely token, with its log-probability at temperature 1. Else the token is sampled by
    inverting the CDF: the first in vocabulary order whose cumulative probability, in fixed point, exceeds uniform_B
    (float64) times that of all candidates. Candidates are the tokens that are not `forbidden`, of those the top_k most
    likely, and of those the top_p nucleus (Holtzman et al., 2020) of their renormalized probabilities.
    """
    scaled_BV = logits_BV.float() / (temperature or 1.0)
    probabilities_BV = candidates_BV = scaled_BV.softmax(dim=-1)
    if forbidden is not None or top_k is not None:
        scaled_BV = _restricted(scaled_BV, top_k if temperature else None, forbidden)
        candidates_BV = scaled_BV.softmax(dim=-1)
    if temperature == 0:
        tokens_B = scaled_BV.argmax(dim=-1)
    else:
        assert uniform_B is not None
        nucleus_BV = _fixed_point(candidates_BV)
        if top_p < 1:
            nucleus_BV.masked_fill_(~nucleus(candidates_BV, top_p), 0)
        # in place: [B, V] in int64 is the largest tensor here
        cumulative_BV = nucleus_BV.cumsum_(dim=-1)
        threshold_B1 = (uniform_B[:, None] * cumulative_BV[:, -1:]).long()
        # right=True: at a uniform of exactly 0 a token of probability 0 must not be picked
        tokens_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
        # NaN logits: the log-probability shows them, while a token outside the vocabulary would crash
        tokens_B.clamp_(max=logits_BV.shape[-1] - 1)
    return tokens_B, probabilities_BV.gather(-1, tokens_B[:, None])[:, 0].log()


def nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """Tokens whose more likely tokens have a total probability below top_p, bool [B, V]; ties in vocabulary order.

    With bf16 logits ties are common.
    """
    largest_BK, inside_BK = _largest_with_nucleus(probabilities_BV, top_p)
    smallest_B1 = largest_BK.gather(-1, inside_BK.sum(dim=-1, keepdim=True).clamp(min=1) - 1)
    tied_B1 = (inside_BK & (largest_BK == smallest_B1)).sum(dim=-1, keepdim=True)
    return _down_to(probabilities_BV, smallest_B1, tied_B1)


def _restricted(logits_BV: Tensor, top_k: int | None, forbidden: Forbidden | None) -> Tensor:
    """Logits with -inf for forbidden tokens, and for all but the top_k most likely others; ties in vocabulary order."""
    # of the logits, not the probabilities: where one token has them all, the others' are 0 and could not be rescaled
    if forbidden is not None:
        # a tokenizer may have more tokens than its model
        inside = forbidden.ids[forbidden.ids < logits_BV.shape[-1]]
        filled_BV = logits_BV.index_fill(-1, inside, -torch.inf)
        logits_BV = torch.where(forbidden.rows_B[:, None], filled_BV, logits_BV)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        largest_BK = logits_BV.topk(top_k).values
        smallest_B1 = largest_BK[:, -1:]
        tied_B1 = (largest_BK == smallest_B1).sum(dim=-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(~_down_to(logits_BV, smallest_B1, tied_B1), -torch.inf)
    return logits_BV


def _down_to(values_BV: Tensor, smallest_B1: Tensor, tied_B1: Tensor) -> Tensor:
    """Mask of the values above the smallest, and of the first tied_B1 that equal it, bool [B, V]."""
    tied_BV = values_BV == smallest_B1
    return (values_BV > smallest_B1) | (tied_BV & (tied_BV.cumsum(dim=-1, dtype=torch.int32) <= tied_B1))


def _largest_with_nucleus(probabilities_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The K largest probabilities, enough to contain every row's nucleus, and a mask of those in it, bool [B, K]."""
    vocabulary = probabilities_BV.shape[-1]
    for count in MOST_LIKELY:
        if count < vocabulary:
            largest_BK = probabilities_BV.topk(count).values
            inside_BK = _is_inside(largest_BK, top_p)
            if not bool(inside_BK[:, -1].any()):
                return largest_BK, inside_BK
    largest_BV = probabilities_BV.sort(descending=True).values
    return largest_BV, _is_inside(largest_BV, top_p)


def _is_inside(largest_BK: Tensor, top_p: float) -> Tensor:
    """Mask of the nucleus among sorted probabilities, bool [B, K]."""
    largest_BK = _fixed_point(largest_BK)
    return largest_BK.cumsum(dim=-1) - largest_BK < top_p * ONE


def _fixed_point(probabilities: Tensor) -> Tensor:
    """Probabilities times ONE, int64; exact, but for what is below 1 / ONE."""
    return (probabilities * ONE).long()  # a power of 2: the product is exact in fp32
