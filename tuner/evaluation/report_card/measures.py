"""Measures of scored pairs: accuracy and differences with their intervals, and calibration.

Everything is weighted so that every prompt counts once, and intervals take into account which pairs depend on
each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tuner.evaluation.report_card.pairs import ScoredPairs

Z95 = 1.959964
"""Two-sided 95% of the normal distribution."""
CONFIDENCE_BINS = 10
"""Bins of equal width over confidences 0.5..1."""


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs in the right order, with its 95% interval."""

    value: float
    low: float
    high: float
    rows: int
    pairs: int


@dataclass(frozen=True)
class Difference:
    """Difference of two accuracies on the same pairs, with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ConfidenceBin:
    """Pairs whose confidence lies in [low, high)."""

    low: float
    high: float
    confidence: float
    """Mean of max(P, 1 - P)."""
    right: float
    """Share in the right order."""
    share: float
    """Share of the total weight."""
    pairs: int


@dataclass(frozen=True)
class Calibration:
    """How well confidence agrees with accuracy; P(better wins) = sigmoid(better - worse)."""

    ece: float
    """Expected calibration error: the mean of |share right - mean confidence| over bins, weighted by share."""
    confidence: float
    """Mean confidence; above the accuracy the model is over-confident."""
    bins: tuple[ConfidenceBin, ...]
    """Bins that hold pairs, from least to most confident."""


def accuracy(pairs: ScoredPairs, right: np.ndarray | None = None) -> Accuracy | None:
    """Weighted share of correctly ordered pairs (or mean of `right`, float [P] in 0..1) with a 95% interval.

    None without pairs.

    Wilson's interval (1927) on the effective number of rows: p(1 - p) / variance, where the variance is that of
    a ratio over clusters (rows, joined with their twins), Σ_g (Σ_i w_i (right_i - p))² / (Σ w)². It is
    never more than Kish's effective number of rows, (Σ w)² / Σ w² over rows, and that number where p is 0 or 1.
    A bootstrap's interval would have no width when all rows are right, however few. Franco et al. 2019 (PMC6690503)
    recommend Wilson's among intervals on an effective sample size; all of these cover a little less than 95% where
    clusters are few.
    """
    if not len(pairs):
        return None
    right = pairs.right if right is None else right
    value = float(np.average(right, weights=pairs.weights))
    bernoulli, variance = value * (1 - value), _variance(pairs, right - value)
    rows = max(1.0, min(_effective_rows(pairs), bernoulli / variance if variance > 0 else np.inf))
    middle = (value + Z95**2 / (2 * rows)) / (1 + Z95**2 / rows)
    half = Z95 * np.sqrt(bernoulli / rows + (Z95 / (2 * rows)) ** 2) / (1 + Z95**2 / rows)
    low, high = max(0.0, float(middle - half)), min(1.0, float(middle + half))
    return Accuracy(value, low, high, len(np.unique(pairs.rows)), len(pairs))


def difference(pairs: ScoredPairs, right: np.ndarray, other: np.ndarray) -> Difference | None:
    """Weighted mean of right - other (both float [P]) with a normal 95% interval over clusters; None without pairs."""
    if not len(pairs):
        return None
    gains = right - other
    value = float(np.average(gains, weights=pairs.weights))
    half = Z95 * float(np.sqrt(_variance(pairs, gains - value)))
    return Difference(value, value - half, value + half)


def twins_right(pairs: ScoredPairs) -> float | None:
    """Share of groups of twins with every pair in the right order (a tie is not); None where there are no twins."""
    pairs = pairs.select(pairs.with_twin)
    if not len(pairs):
        return None
    _, group = np.unique(pairs.twins, return_inverse=True)
    wrong = np.bincount(group, weights=pairs.right < 1)
    return float(np.mean(wrong == 0))


def calibration(pairs: ScoredPairs) -> Calibration | None:
    """Reliability bins and expected calibration error (Guo et al. 2017, arXiv:1706.04599); None without pairs."""
    if not len(pairs):
        return None
    confidences = 1 / (1 + np.exp(-np.abs(pairs.margins)))  # max(P, 1 - P), without overflow
    number = np.minimum(((confidences - 0.5) * 2 * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    total = pairs.weights.sum()
    bins = []
    for index in np.unique(number):
        inside = number == index
        weights = pairs.weights[inside]
        bins.append(
            ConfidenceBin(
                low=0.5 + int(index) / (2 * CONFIDENCE_BINS),
                high=0.5 + (int(index) + 1) / (2 * CONFIDENCE_BINS),
                confidence=float(np.average(confidences[inside], weights=weights)),
                right=float(np.average(pairs.right[inside], weights=weights)),
                share=float(weights.sum() / total),
                pairs=int(inside.sum()),
            )
        )
    ece = sum(part.share * abs(part.right - part.confidence) for part in bins)
    return Calibration(ece, float(np.average(confidences, weights=pairs.weights)), tuple(bins))


def quantile_bins(values: np.ndarray, most: int) -> list[np.ndarray]:
    """Masks of up to `most` bins with about as many values each, lowest first; equal values share a bin."""
    if not len(values):
        return []
    edges = np.unique(np.quantile(values, np.arange(1, most) / most, method="lower"))
    number = np.searchsorted(edges, values, side="left")
    return [number == index for index in np.unique(number)]


def _variance(pairs: ScoredPairs, deviations: np.ndarray) -> float:
    """Variance of a weighted mean over clusters, from the values' deviations from it."""
    _, cluster = np.unique(pairs.clusters, return_inverse=True)
    sums = np.bincount(cluster, weights=pairs.weights * deviations)
    return float(np.sum(sums**2) / pairs.weights.sum() ** 2)


def _effective_rows(pairs: ScoredPairs) -> float:
    """Kish's effective number of rows: their number where all weigh the same; 1 where all are in one cluster."""
    if len(np.unique(pairs.clusters)) == 1:
        return 1.0
    _, row = np.unique(pairs.rows, return_inverse=True)
    sums = np.bincount(row, weights=pairs.weights)
    return float(sums.sum() ** 2 / np.sum(sums**2))
