"""Tokenized answers that are each desirable or not.

Shapes: N sequences, a prompt with one answer each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.data.comparisons import TokenizedComparison
from tuner.data.examples import Collector, Examples


@dataclass(frozen=True)
class Labels:
    """N answers to prompts, with their labels."""

    sequences: Examples
    """The N conversations, one answer each; the tokens of the assistant's turns in it have a weight."""
    starts: np.ndarray
    """int64 [N]: index in its sequence of the answer's first token."""
    desirable: np.ndarray
    """bool [N]."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def sources(self) -> np.ndarray:
        """int32 [N]: number of the config's source that an answer comes from."""
        return self.sequences.sources

    @property
    def conditions(self) -> np.ndarray:
        """int64 [N]: 1 for a desirable answer, else 0; subsets keep the shares of both."""
        return self.desirable.astype(np.int64)

    def origin(self, index: int) -> str:
        """`file:line` of an answer."""
        return self.sequences.origin(index)

    def take(self, indices: Sequence[int] | np.ndarray) -> Labels:
        """The answers of these indices, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        return Labels(self.sequences.take(indices), self.starts[indices], self.desirable[indices])

    def fingerprint(self) -> str:
        """Hash of all that the loss depends on, in order."""
        digest = hashlib.blake2b(self.sequences.fingerprint().encode(), digest_size=16)
        for array in (self.starts, self.desirable):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class LabelCollector:
    """Collects the answers of rows into Labels: those of rank 0 are desirable."""

    def __init__(self) -> None:
        self._sequences = Collector()
        self._starts: list[int] = []
        self._desirable: list[bool] = []

    def add(self, row: TokenizedComparison, source: int, file: str, line: int) -> None:
        """Append the answers of a row at `file:line`; source: the number of its source."""
        for sample, start, rank in zip(row.samples, row.starts, row.ranks, strict=True):
            self._sequences.add(sample, source, file, line)
            self._starts.append(start)
            self._desirable.append(rank == 0)

    def finish(self) -> Labels | None:
        """All answers that were added; None when there are none."""
        sequences = self._sequences.finish()
        if sequences is None:
            return None
        return Labels(
            sequences, np.array(self._starts, dtype=np.int64), np.array(self._desirable, dtype=bool)
        )
