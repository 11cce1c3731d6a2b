"""Pairs of answers with their scores, from which a report card is computed.

Arrays over pairs have length P. There is no torch here: scores come as NumPy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PairText:
    """The texts of one pair."""

    prompt: str
    chosen: str
    rejected: str
    condition: str
    """Name of the row's condition; "" = none."""
    origin: str
    """Where the row is from, as `file:line`."""


@dataclass(frozen=True)
class ScoredPairs:
    """P pairs of answers, scored under one control; arrays of length P."""

    chosen: np.ndarray
    """float64, score of the better answer."""
    rejected: np.ndarray
    """float64, score of the worse answer."""
    weights: np.ndarray
    """float64, above 0; the pairs of one row sum to 1: a prompt counts once."""
    rows: np.ndarray
    """int64, number of the row: its pairs are not independent of each other."""
    conditions: tuple[str, ...]
    """Name of the row's condition, also where a control replaced its wording; "" = none."""
    sources: tuple[str, ...]
    """Path of the source."""
    chosen_tokens: np.ndarray
    """int64, tokens of the better answer alone."""
    rejected_tokens: np.ndarray
    """int64, tokens of the worse answer alone."""
    positions: np.ndarray
    """int64, where the better answer's score was read, in tokens from the beginning of its sequence."""
    cut: np.ndarray
    """bool, whether the prompt was truncated."""
    twins: np.ndarray
    """int64: the same number = the same two answers under conditions that prefer opposite ones; -1 = no twin."""

    def __post_init__(self) -> None:
        """Raises ValueError unless all fields have the same length."""
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"fields of ScoredPairs differ in length: {lengths}")

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def margins(self) -> np.ndarray:
        """float64, better minus worse score: above 0 where the scores have the right order."""
        return self.chosen - self.rejected

    @property
    def right(self) -> np.ndarray:
        """float64: 1 where the better answer scores higher, 0 where lower; a tie is half right."""
        return half_for_ties(self.margins)

    @property
    def longer(self) -> np.ndarray:
        """float64: 1 where the better answer is longer, 0 where shorter; a tie is half."""
        return half_for_ties(self.chosen_tokens - self.rejected_tokens)

    @property
    def finite(self) -> np.ndarray:
        """bool: both scores are finite."""
        return np.isfinite(self.chosen) & np.isfinite(self.rejected)

    @property
    def with_twin(self) -> np.ndarray:
        """bool: another of these pairs has the same twin number; a twin that was left out does not count."""
        _, group, sizes = np.unique(self.twins, return_inverse=True, return_counts=True)
        return (self.twins >= 0) & (sizes[group] > 1)

    @property
    def clusters(self) -> np.ndarray:
        """Number of each pair's cluster, int64: pairs of one row, and of rows joined by twins, depend on each other.

        Twins hold the same two answers, so that a pair hard to order is hard for both: counted as independent, they
        would make intervals too narrow (simulated at a correlation of 0.45: 95% intervals would cover 89%).
        """
        _, rows = np.unique(self.rows, return_inverse=True)
        paired = self.twins >= 0
        _, twins = np.unique(self.twins[paired], return_inverse=True)
        labels = np.arange(len(np.unique(self.rows)))
        while True:  # the lowest label spreads from row to row: one round for twins in pairs
            lowest = np.full(len(twins), len(labels))
            np.minimum.at(lowest, twins, labels[rows[paired]])
            joined = labels.copy()
            np.minimum.at(joined, rows[paired], lowest[twins])
            if np.array_equal(joined, labels):
                return labels[rows]
            labels = joined

    def select(self, keep: np.ndarray) -> ScoredPairs:
        """The pairs of a mask (bool, length P) or of indices (int), in that order."""
        keep = np.asarray(keep)
        places = np.flatnonzero(keep) if keep.dtype == bool else keep.astype(np.int64)
        columns: dict[str, Any] = {}
        for field in fields(self):
            column = getattr(self, field.name)
            columns[field.name] = (
                tuple(column[place] for place in places) if isinstance(column, tuple) else column[places]
            )
        return ScoredPairs(**columns)


def half_for_ties(differences: np.ndarray) -> np.ndarray:
    """float64: 1 above zero, 0 below, 0.5 at zero."""
    return (np.sign(differences) + 1) / 2
