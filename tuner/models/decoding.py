"""Rows that are decoded together and join and leave at any token (continuous batching, Yu et al., 2022: Orca).

Shapes: B places for rows, L of them taken, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tuner.models.kv_cache import RowCache
from tuner.models.prefill import TOKENS_PER_PASS, prefill
from tuner.models.rope import switch_length

BLOCK = 64
"""Slots for new tokens at first. They double when all are taken, so that the cache is seldom copied."""
FREE = -1
"""Number of a place without a row."""


class Decoding:
    """Rows, their keys and values, and what the model predicts behind their last tokens.

    Rows have numbers of the caller's, from 0. A place whose row has left is computed on until another row takes it or
    the rows move together. Used inside `unpacked` and `torch.no_grad`, from one thread.
    """

    logits_BV: Tensor
    """Logits of the next token of every row; those of free places mean nothing."""

    def __init__(self, transformer: PreTrainedModel, tokens_per_pass: int = TOKENS_PER_PASS) -> None:
        """tokens_per_pass: of prompts."""
        self._transformer, self._tokens_per_pass = transformer, tokens_per_pass
        self._switch = switch_length(transformer.config)
        self._clear()

    def _clear(self) -> None:
        self._cache: RowCache | None = None
        self._texts: dict[int, list[int]] = {}
        """Of each row, its prompt and its answer so far, where rows that grow long are read again."""
        self.logits_BV = torch.empty(0)
        self.numbers_B = np.full(0, FREE)
        self._lengths_B, self._prompts_B, self._limits_B = (np.zeros(0, np.int64) for _ in range(3))

    @property
    def places(self) -> np.ndarray:
        """Places that are taken, int64 [L]."""
        return np.flatnonzero(self.numbers_B != FREE)

    @property
    def counts(self) -> np.ndarray:
        """Tokens that each row has been given, int64 [B]; 0 in free places."""
        return self._lengths_B - self._prompts_B

    @property
    def longest(self) -> int:
        """Most tokens of prompt and answer that a row may have; 0 without rows."""
        return int(self._limits_B.max(initial=0))

    def slots_with(self, limits: Sequence[int]) -> int:
        """Most tokens that the cache holds if rows of so many tokens, prompt and answer, joined now."""
        rows, longest = len(self.places) + len(limits), max(self.longest, *limits)
        if (
            self._cache is None or rows > self._cache.rows
        ):  # it is new, or moved and no larger than it must be
            return rows * longest
        return self._cache.rows * max(longest, self._cache.capacity)

    def join(self, numbers: Sequence[int], prompts: Sequence[Sequence[int]], most_new: Sequence[int]) -> None:
        """Read the prompts of new rows. most_new: tokens that each may be given, at least 1.

        Raises UserError for models with layers other than attention.
        """
        taken = self.places
        missing = len(taken) + len(numbers) - len(self.numbers_B)
        if missing > 0:
            self.numbers_B = np.concatenate((self.numbers_B, np.full(missing, FREE)))
            self._lengths_B, self._prompts_B, self._limits_B = (
                np.concatenate((part, np.zeros(missing, np.int64)))
                for part in (self._lengths_B, self._prompts_B, self._limits_B)
            )
        places = np.flatnonzero(self.numbers_B == FREE)[: len(numbers)]
        lengths = np.array([len(prompt) for prompt in prompts])
        self.numbers_B[places], self._lengths_B[places], self._prompts_B[places] = numbers, lengths, lengths
        self._limits_B[places] = lengths + most_new
        if self._cache is None:
            self._cache = RowCache(self._transformer, len(self.numbers_B), self._capacity())
        elif missing > 0 or lengths.max() >= self._cache.capacity:
            self._move(np.arange(self._cache.rows), int(self._lengths_B[taken].max(initial=0)))
        logits_LV = prefill(self._transformer, prompts, places, self._cache, self._tokens_per_pass)
        self._keep_logits(places, logits_LV)
        if self._switch is not None:
            self._texts |= {number: list(prompt) for number, prompt in zip(numbers, prompts, strict=True)}

    def _keep_logits(self, places: np.ndarray, logits_LV: Tensor) -> None:
        if len(places) == len(self.numbers_B):
            self.logits_BV = logits_LV
            return
        if len(self.logits_BV) < len(self.numbers_B):
            logits_BV = logits_LV.new_zeros(len(self.numbers_B), logits_LV.shape[-1])
            logits_BV[: len(self.logits_BV)] = self.logits_BV
            self.logits_BV = logits_BV
        self.logits_BV[torch.from_numpy(places).to(logits_LV.device)] = logits_LV

    def leave(self, places: np.ndarray) -> None:
        """The rows in these places (int64) want no more tokens."""
        for number in self.numbers_B[places].tolist():
            self._texts.pop(number, None)
        self.numbers_B[places] = FREE
        self._lengths_B[places] = self._prompts_B[places] = self._limits_B[places] = 0

    def step(self, tokens_B: Tensor, *, others_follow: bool = False) -> None:
        """Take the next token of every row (int64; those of free places are ignored), and predict those behind them.

        Gives up keys and values when no row is left. Places are given up once they are half of all, and not one by
        one, as rows are copied for it; others_follow: never, since other rows will take them.
        """
        places = self.places
        if not len(places):
            self._clear()
            return
        cache, filled = self._cache, int(self._lengths_B.max())
        assert cache is not None
        is_full = filled == cache.capacity
        if not others_follow and (2 * len(places) <= cache.rows or (is_full and len(places) < cache.rows)):
            self.numbers_B, self._lengths_B, self._prompts_B, self._limits_B = (
                part[places] for part in (self.numbers_B, self._lengths_B, self._prompts_B, self._limits_B)
            )
            tokens_B = tokens_B[self._move(places, filled)]
        elif is_full:
            self._move(np.arange(cache.rows), filled)
        self._reread(tokens_B)
        cache.decode(self._lengths_B)
        self.logits_BV = self._transformer(
            input_ids=tokens_B[:, None],
            attention_mask=cache.mask,
            position_ids=cache.positions,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        self._lengths_B[self.places] += 1

    def _move(self, places: np.ndarray, filled: int) -> Tensor:
        """Copy rows in these places to the first ones of new memory; returns the places on the device."""
        assert self._cache is not None
        return self._cache.move(places, filled, len(self.numbers_B), self._capacity())

    def _capacity(self) -> int:
        """Slots of a row: those of its tokens, and as many new ones as any has been given, or a block."""
        room = max(BLOCK, int(self.counts.max()))
        return min(int(self._lengths_B.max()) + room, self.longest)

    def _reread(self, tokens_B: Tensor) -> None:
        """Write the keys of rows anew whose next token makes them too long for LongRoPE's short set of frequencies.

        As LongRoPE2 does (arXiv 2502.20082): each token is then predicted as by a pass over the tokens before it.
        """
        if self._switch is None:
            return
        assert self._cache is not None
        for number, token in zip(self.numbers_B.tolist(), tokens_B.tolist(), strict=True):
            if number != FREE:
                self._texts[number].append(token)
        outgrown = np.flatnonzero(self._lengths_B == self._switch)
        if len(outgrown):
            rows = [self._texts[number] for number in self.numbers_B[outgrown].tolist()]
            prefill(self._transformer, rows, outgrown, self._cache, self._tokens_per_pass)
