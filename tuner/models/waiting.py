"""Prompts that wait until the cache has room for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuner.models.kv_cache import MOST_ROWS

REFILLED = 8
"""Rows join once an eighth of the places is free: a pass over few prompts takes nearly the time of one over many."""


class Waiting:
    """Prompts in the order in which they join: longest first, so that each fits in the place of one before it."""

    def __init__(self, lengths: Sequence[int], max_new_tokens: int, cached_tokens: int) -> None:
        """cached_tokens: those whose keys and values may be held at a time, unless one row needs more."""
        self._lengths, self._max_new_tokens = np.asarray(lengths, dtype=np.int64), max_new_tokens
        self._cached_tokens = cached_tokens
        self._order, self._next = np.argsort(-self._lengths, kind="stable"), 0

    def __len__(self) -> int:
        return len(self._order) - self._next

    def take(self, running: int, longest: int) -> np.ndarray:
        """Indices of the prompts that join now, int64; a function of the arguments so far alone.

        running: rows that have not ended; longest: most tokens, prompt and answer, that one of them may have. Rows
        times that maximum stay within `cached_tokens`, but there is at least one row.
        """
        if not len(self):
            return self._order[:0]
        longest = max(longest, int(self._lengths[self._order[self._next]]) + self._max_new_tokens)
        most = min(max(self._cached_tokens // longest, 1), MOST_ROWS)
        free = min(most - running, len(self))
        if running and free < min(-(-most // REFILLED), len(self)):
            return self._order[:0]
        start, self._next = self._next, self._next + free
        return self._order[start : self._next]
