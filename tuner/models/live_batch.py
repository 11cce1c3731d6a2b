"""Generation for a server: rows that join and leave at any token (continuous batching, Yu et al., 2022: Orca).

Shapes: B places for rows, L of their rows, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tuner.models.decoding import Decoding
from tuner.models.sampling import choose


@dataclass(frozen=True)
class Token:
    """A token of an answer."""

    id: int
    logprob: float
    """Log-probability at temperature 1 over the whole vocabulary."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The most likely tokens in its place, likeliest first, with their log-probabilities."""


@dataclass(frozen=True)
class RowSettings:
    """How the tokens of a row are chosen."""

    max_new_tokens: int
    temperature: float = 1.0
    """0: greedy decoding."""
    top_p: float = 1.0
    top_k: int | None = None
    num_likeliest: int = 0
    """Most likely tokens that are reported beside each token."""

    @property
    def sampling(self) -> tuple[float, float, int | None]:
        """What rows must have in common to be sampled together."""
        return (self.temperature, self.top_p, self.top_k) if self.temperature else (0.0, 1.0, None)


class Row(Protocol):
    """A prompt whose answer is generated."""

    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def settings(self) -> RowSettings: ...

    def noise(self) -> float:
        """A uniform number in [0, 1) that selects the next token."""
        ...

    def take(self, token: Token) -> bool:
        """Take the answer's next token; returns whether another one is wanted."""
        ...


class LiveBatch:
    """The rows that are generated now, and their keys and values.

    What a row's tokens are does not depend on the others, but for rounding. Used inside `unpacked` and
    `torch.no_grad`, from one thread.
    """

    def __init__(self, transformer: PreTrainedModel) -> None:
        self._decoding = Decoding(transformer)
        self._rows: dict[int, Row] = {}
        """By their numbers in the decoding."""
        self._started = 0

    @property
    def rows(self) -> list[Row]:
        """The rows that have not ended."""
        return list(self._rows.values())

    def slots_with(self, rows: Sequence[Row]) -> int:
        """Most tokens that the cache would have to hold if these rows joined now."""
        return self._decoding.slots_with([len(row.prompt) + row.settings.max_new_tokens for row in rows])

    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows. Raises UserError for models with layers other than attention."""
        numbers = range(self._started, self._started + len(rows))
        self._started += len(rows)
        self._decoding.join(
            numbers, [row.prompt for row in rows], [row.settings.max_new_tokens for row in rows]
        )
        self._rows |= zip(numbers, rows, strict=True)

    def step(self) -> None:
        """Give every row its next token; rows that want no more leave."""
        decoding = self._decoding
        logits_BV = decoding.logits_BV
        tokens_B = torch.zeros(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
        for places in self._groups():
            tokens_B[places] = self._choose(logits_BV[places], places)
        decoding.step(tokens_B)

    def _choose(self, logits_LV: Tensor, places: list[int]) -> Tensor:
        """The next tokens of rows that are sampled alike, int64 [L], given to them."""
        numbers = self._decoding.numbers_B[places].tolist()
        rows = [self._rows[number] for number in numbers]
        temperature, top_p, top_k = rows[0].settings.sampling
        noise_L = None
        if temperature:
            noise_L = torch.tensor(
                [row.noise() for row in rows], dtype=torch.float64, device=logits_LV.device
            )
        tokens_L, _ = choose(logits_LV, temperature, top_p, noise_L, top_k=top_k)
        tokens = described(logits_LV, tokens_L, [row.settings.num_likeliest for row in rows])
        ended = [not row.take(token) for row, token in zip(rows, tokens, strict=True)]
        for number in itertools.compress(numbers, ended):
            del self._rows[number]
        self._decoding.leave(np.array(places)[ended])
        return tokens_L

    def _groups(self) -> list[list[int]]:
        """Places of the rows, by how they are sampled."""
        groups: dict[tuple[float, float, int | None], list[int]] = {}
        for place in self._decoding.places.tolist():
            row = self._rows[int(self._decoding.numbers_B[place])]
            groups.setdefault(row.settings.sampling, []).append(place)
        return list(groups.values())


def described(logits_BV: Tensor, chosen_B: Tensor, num_likeliest: Sequence[int]) -> list[Token]:
    """Tokens with their log-probabilities, and each with that many most likely ones."""
    logprobs_BV = logits_BV.float().log_softmax(dim=-1)
    chosen = logprobs_BV.gather(-1, chosen_B[:, None])[:, 0].tolist()
    best = logprobs_BV.topk(min(max(num_likeliest), logprobs_BV.shape[-1]))
    ids, logprobs = best.indices.tolist(), best.values.tolist()
    return [
        Token(token, chosen[row], tuple(zip(ids[row][:count], logprobs[row][:count], strict=True)))
        for row, (token, count) in enumerate(zip(chosen_B.tolist(), num_likeliest, strict=True))
    ]
