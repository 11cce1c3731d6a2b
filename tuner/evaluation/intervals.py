"""95% confidence intervals of means and win rates, over prompts that may come in clusters.

A cluster holds prompts with the same question, perhaps under several conditions: an answer that is good for one of them
is often good for all, so that counting them as independent would make intervals too narrow.

Shapes: A answers, in the same order in all arrays; `clusters_A` holds the number of each prompt's cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tuner.evaluation.report_card.measures import Z95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% confidence interval."""

    value: float
    low: float
    high: float


def mean(values_A: np.ndarray, clusters_A: np.ndarray) -> Interval:
    """Mean with its normal interval, which has no width where all prompts are in one cluster."""
    value = float(np.mean(values_A))
    half = Z95 * math.sqrt(_variance(values_A - value, clusters_A))
    return Interval(value, value - half, value + half)


def share(values_A: np.ndarray, clusters_A: np.ndarray) -> Interval:
    """Mean of values in 0..1 with Wilson's interval (1927), which stays in 0..1 and has a width where all are equal.

    Computed for the effective number of prompts, p(1 - p) / variance of the mean, and at most their number; where all
    values are equal, for the number of clusters.
    """
    value = float(np.mean(values_A))
    bernoulli, variance = value * (1 - value), _variance(values_A - value, clusters_A)
    most = len(values_A) if variance > 0 else len(np.unique(clusters_A))
    count = max(1.0, min(most, bernoulli / variance if variance > 0 else math.inf))
    middle = (value + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 * math.sqrt(bernoulli / count + (Z95 / (2 * count)) ** 2) / (1 + Z95**2 / count)
    return Interval(value, max(0.0, middle - half), min(1.0, middle + half))


def win_share(signs_A: np.ndarray, clusters_A: np.ndarray) -> Interval:
    """Share of wins with ties half, of signs 1 (win), 0 (tie) and -1 (loss): half of one plus `paired_difference`.

    Without ties its interval is Wilson's; ties make it narrower, but where everything ties it still has a width.
    """
    gain = paired_difference(signs_A, clusters_A)
    return Interval(*((1 + value) / 2 for value in (gain.value, gain.low, gain.high)))


def paired_difference(signs_A: np.ndarray, clusters_A: np.ndarray) -> Interval:
    """Share of signs 1 less that of signs -1, with its score interval, which stays in -1..1.

    Tango's for paired proportions (Statistics in Medicine 17, 1998, 891-908). Counts are divided by the design effect
    of the clusters: the variance over clusters divided by that over independent prompts, at least 1.
    """
    wins, losses = int(np.sum(signs_A > 0)), int(np.sum(signs_A < 0))
    effect = _design_effect(signs_A, clusters_A)
    return Interval(
        (wins - losses) / len(signs_A), *_tango(wins / effect, losses / effect, len(signs_A) / effect)
    )


def sign_test(signs_A: np.ndarray, clusters_A: np.ndarray) -> float:
    """Two-sided p value of the exact sign test: wins and losses at least as uneven if both were equally likely.

    Ties are left out. Under the null hypothesis the signs of a cluster's prompts flip together.
    """
    _, cluster = np.unique(clusters_A, return_inverse=True)
    sums = np.rint(np.bincount(cluster, weights=signs_A)).astype(int)
    distribution = np.ones(1)  # probability of each sum of wins, one size of cluster after another
    for size, count in zip(*np.unique(np.abs(sums[sums != 0]), return_counts=True), strict=True):
        added = np.zeros(size * count + 1)
        added[::size] = _coin_tosses(int(count))
        distribution = np.convolve(distribution, added)
    differences = np.abs(2 * np.arange(len(distribution)) - (len(distribution) - 1))
    return min(1.0, float(distribution[differences >= abs(int(sums.sum()))].sum()))


def _coin_tosses(count: int) -> np.ndarray:
    """Probability of 0 to `count` heads in `count` tosses of a fair coin, float64 [count + 1]."""
    # In logarithms: as floats, binomial coefficients overflow beyond 1,029 tosses.
    ways = [
        math.lgamma(count + 1) - math.lgamma(heads + 1) - math.lgamma(count - heads + 1)
        for heads in range(count + 1)
    ]
    return np.exp(np.array(ways) - count * math.log(2))


def _tango(wins: float, losses: float, count: float) -> tuple[float, float]:
    """Bounds of the difference p(win) - p(loss): the differences that the score test just does not reject at 5%."""

    def rejection(difference: float) -> float:
        """Above 0 where the test rejects the difference: outside of the interval."""
        deviation = wins - losses - count * difference
        linear = (2 * count - wins + losses) * difference - wins - losses
        constant = -losses * difference * (1 - difference)
        # Rounding can take the discriminant just below 0.
        root = math.sqrt(max(0.0, linear**2 - 8 * count * constant))
        losing = (root - linear) / (4 * count)  # maximum-likelihood p(loss), given the difference
        return deviation**2 - Z95**2 * count * (2 * losing + difference * (1 - difference))

    estimate = (wins - losses) / count
    return _root(rejection, estimate, -1.0), _root(rejection, estimate, 1.0)


def _root(function: Callable[[float], float], inside: float, outside: float) -> float:
    """Where a function that is above 0 at `outside` changes its sign, by bisection."""
    # 60 halvings of an interval of at most 2 are below the rounding of float64.
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if function(middle) > 0 else (middle, outside)
    return (inside + outside) / 2


def _design_effect(values_A: np.ndarray, clusters_A: np.ndarray) -> float:
    """Variance of the mean over clusters, divided by that of as many independent prompts; at least 1."""
    count, groups = len(values_A), len(np.unique(clusters_A))
    deviations_A = values_A - np.mean(values_A)
    independent = float(np.sum(deviations_A**2)) / count**2
    # All values are equal: their variance says nothing, so each cluster counts as one prompt.
    if independent == 0:
        return count / groups
    return max(1.0, _variance(deviations_A, clusters_A) / independent)


def _variance(deviations_A: np.ndarray, clusters_A: np.ndarray) -> float:
    """Variance of the mean of clustered values, from their deviations from it."""
    _, cluster = np.unique(clusters_A, return_inverse=True)
    sums = np.bincount(cluster, weights=deviations_A)
    return float(np.sum(sums**2)) / len(deviations_A) ** 2
