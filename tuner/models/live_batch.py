"""Generation for a server: rows that join and leave at any token (continuous batching, Yu et al., 2022: Orca).

Shapes: B rows generated together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tuner.models.generate import prefill, rewrite_outgrown
from tuner.models.kv_cache import RowCache
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
        self._transformer = transformer
        self._cache: RowCache | None = None
        self._clear()

    @property
    def rows(self) -> list[Row]:
        """The rows that have not ended."""
        return [row for row, is_live in zip(self._rows, self._live_B, strict=True) if is_live]

    def slots_with(self, rows: Sequence[Row]) -> int:
        """Most tokens that the cache would have to hold if these rows joined now."""
        lengths = [*self._lengths_B.tolist(), *(len(row.prompt) for row in rows)]
        wanted = [row.settings.max_new_tokens for row in (*self._rows, *rows)]
        taken = [*self._counts_B.tolist(), *(0 for _ in rows)]
        remaining = max((most - count for most, count in zip(wanted, taken, strict=True)), default=0)
        # aligned at their last tokens, so that the longest row and the longest answer may be different ones
        return len(lengths) * (max(lengths, default=0) + remaining)

    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows. Raises UserError for models with layers other than attention."""
        lengths = [len(row.prompt) for row in rows]
        cache = RowCache(self._transformer, lengths, max(row.settings.max_new_tokens for row in rows))
        logits_BV = prefill(self._transformer, [row.prompt for row in rows], cache)
        if self._cache is None:
            self._cache, self._logits_BV = cache, logits_BV
        else:
            self._cache.join(cache)
            self._logits_BV = torch.cat((self._logits_BV, logits_BV))
        self._rows += rows
        self._texts += [list(row.prompt) for row in rows]
        self._live_B = np.concatenate((self._live_B, np.ones(len(rows), bool)))
        self._lengths_B = np.concatenate((self._lengths_B, np.array(lengths, np.int64)))
        self._counts_B = np.concatenate((self._counts_B, np.zeros(len(rows), np.int64)))

    def step(self) -> None:
        """Give every row its next token; rows that want no more leave."""
        tokens_B = self._choose()
        if not self._live_B.any():
            self._clear()
            return
        cache = self._cache
        assert cache is not None
        if cache.is_full or 2 * self._live_B.sum() <= len(self._live_B):
            tokens_B = tokens_B[self._keep(np.flatnonzero(self._live_B))]
        for text, token in zip(self._texts, tokens_B.tolist(), strict=True):
            text.append(token)
        rewrite_outgrown(self._transformer, cache, self._texts, self._live_B)
        output = self._transformer(
            input_ids=tokens_B[:, None],
            attention_mask=cache.mask,
            position_ids=torch.from_numpy(self._lengths_B).to(tokens_B.device)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        self._logits_BV = output.logits[:, -1]
        cache.advance()
        self._lengths_B, self._counts_B = self._lengths_B + 1, self._counts_B + 1

    def _choose(self) -> Tensor:
        """The next token of every row, int64 [B], given to those that have not ended; of the others 0."""
        tokens_B = torch.zeros(len(self._rows), dtype=torch.int64, device=self._logits_BV.device)
        for places in self._groups():
            logits_BV = self._logits_BV[places]
            settings = [self._rows[place].settings for place in places]
            temperature, top_p, top_k = settings[0].sampling
            noise_B = None
            if temperature:
                noise = [self._rows[place].noise() for place in places]
                noise_B = torch.tensor(noise, dtype=torch.float64, device=logits_BV.device)
            chosen_B, _ = choose(logits_BV, temperature, top_p, noise_B, top_k=top_k)
            tokens_B[places] = chosen_B
            counts = [setting.num_likeliest for setting in settings]
            for place, token in zip(places, described(logits_BV, chosen_B, counts), strict=True):
                self._live_B[place] = self._rows[place].take(token)
        return tokens_B

    def _groups(self) -> list[list[int]]:
        """The rows that have not ended, by how they are sampled."""
        groups: dict[tuple[float, float, int | None], list[int]] = {}
        for place in np.flatnonzero(self._live_B).tolist():
            groups.setdefault(self._rows[place].settings.sampling, []).append(place)
        return list(groups.values())

    def _keep(self, places: np.ndarray) -> Tensor:
        """Keep only some rows; returns their places on the device."""
        assert self._cache is not None
        places_B = self._cache.keep(places)
        self._rows, self._texts = ([part[place] for place in places] for part in (self._rows, self._texts))
        self._live_B, self._lengths_B, self._counts_B = (
            part[places] for part in (self._live_B, self._lengths_B, self._counts_B)
        )
        return places_B

    def _clear(self) -> None:
        self._cache, self._rows = None, []
        self._texts: list[list[int]] = []
        """Of each row, its prompt and its answer so far."""
        self._logits_BV = torch.empty(0)
        self._live_B = np.zeros(0, bool)
        self._lengths_B, self._counts_B = np.zeros(0, np.int64), np.zeros(0, np.int64)


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
