"""Pairs of answers with their scores: what a report card is made of.

Arrays over pairs have length P. No torch: scores are brought here as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PairText:
    """The texts of one pair, for people to read."""

    prompt: str
    chosen: str
    rejected: str
    condition: str
    """The wording of the system prompt that was given, or the condition's name; "" = none."""
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
    """Name of the condition that the row asks for, whatever the control gave instead; "" = none."""
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
        """Raises ValueError unless all fields are about the same number of pairs."""
        lengths = {one.name: len(getattr(self, one.name)) for one in fields(self)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"fields of ScoredPairs differ in length: {lengths}")

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def margins(self) -> np.ndarray:
        """float64, better minus worse: above 0 where the scores have it right."""
        return self.chosen - self.rejected

    @property
    def right(self) -> np.ndarray:
        """float64: 1 where the better answer scores higher, 0 where lower; a tie is half right."""
        return half_for_ties(self.margins)

    @property
    def longer(self) -> np.ndarray:
        """float64: how right the rule "the longer answer wins" is, with the same half for ties."""
        return half_for_ties(self.chosen_tokens - self.rejected_tokens)

    @property
    def finite(self) -> np.ndarray:
        """bool: both scores are numbers."""
        return np.isfinite(self.chosen) & np.isfinite(self.rejected)

    @property
    def with_twin(self) -> np.ndarray:
        """bool: another pair here has the same twin number. One whose twin is elsewhere has none."""
        _, group, sizes = np.unique(self.twins, return_inverse=True, return_counts=True)
        return (self.twins >= 0) & (sizes[group] > 1)

    @property
    def clusters(self) -> np.ndarray:
        """int64: pairs with the same number depend on each other: pairs of one row, and rows that share twins.

        Twins hold the same two answers, so a hard one is hard for both: counted as independent, they would
        make intervals too narrow (simulated at a correlation of 0.45: 95% intervals would hold 89 times in 100).
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
        chosen = np.flatnonzero(keep) if keep.dtype == bool else keep.astype(np.int64)
        taken: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            taken[one.name] = (
                tuple(value[index] for index in chosen) if isinstance(value, tuple) else value[chosen]
            )
        return ScoredPairs(**taken)


def half_for_ties(differences: np.ndarray) -> np.ndarray:
    """float64: 1 above zero, 0 below, 0.5 at zero."""
    return (np.sign(differences) + 1) / 2
