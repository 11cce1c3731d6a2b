"""95% intervals of means and of win rates, over prompts of which some may belong together.

Prompts belong together where they ask the same thing, under several conditions perhaps: an answer that is good for one
of them is often good for all, so that counted as independent they would make intervals too narrow.

Shapes: A answers, numbered alike in all arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tuner.evaluation.report_card.measures import Z95


@dataclass(frozen=True)
class Interval:
    """A figure and where it lies with 95% confidence."""

    value: float
    low: float
    high: float


def mean(values_A: np.ndarray, clusters_A: np.ndarray) -> Interval:
    """Mean with its normal interval: of one prompt, or prompts that all belong together, it has no width."""
    value = float(np.mean(values_A))
    half = Z95 * math.sqrt(_variance(values_A - value, clusters_A))
    return Interval(value, value - half, value + half)


def share(values_A: np.ndarray, clusters_A: np.ndarray) -> Interval:
    """Mean of values in 0..1 with Wilson's interval (1927), which stays within and has a width where all are equal.

    On the effective number p(1 - p) / variance of the mean, and at most the number of prompts that do not belong
    together: that number where all values are equal.
    """
    value = float(np.mean(values_A))
    spread, variance = value * (1 - value), _variance(values_A - value, clusters_A)
    most = len(values_A) if variance > 0 else len(np.unique(clusters_A))
    count = max(1.0, min(most, spread / variance if variance > 0 else math.inf))
    middle = (value + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 * math.sqrt(spread / count + (Z95 / (2 * count)) ** 2) / (1 + Z95**2 / count)
    return Interval(value, max(0.0, middle - half), min(1.0, middle + half))


def win_share(signs_A: np.ndarray, clusters_A: np.ndarray) -> Interval:
    """Share of wins with ties half, of signs 1 (win), 0 (tie) and -1 (loss), with its score interval.

    Tango's for paired proportions (Statistics in Medicine 17, 1998, 891-908): wins - losses over all is a difference
    of two proportions on the same prompts, and the win rate is half of one plus it. Without ties this is Wilson's
    interval; ties make it narrower, but where everything ties it still has a width. Where prompts belong together,
    counts are divided by the design effect: the variance over clusters by that of independent prompts, 1 at least.
    """
    wins, losses = int(np.sum(signs_A > 0)), int(np.sum(signs_A < 0))
    effect = _design_effect(signs_A, clusters_A)
    low, high = _tango(wins / effect, losses / effect, len(signs_A) / effect)
    return Interval((1 + (wins - losses) / len(signs_A)) / 2, (1 + low) / 2, (1 + high) / 2)


def sign_test(signs_A: np.ndarray, clusters_A: np.ndarray) -> float:
    """Two-sided probability of wins and losses as uneven, were both as likely; ties say nothing.

    The exact sign test. Where prompts belong together, the signs of all of them turn as one.
    """
    _, cluster = np.unique(clusters_A, return_inverse=True)
    sums = np.rint(np.bincount(cluster, weights=signs_A)).astype(int)
    found = np.ones(1)  # probability of each number of wins, by what a cluster adds to it
    for size, count in zip(*np.unique(np.abs(sums[sums != 0]), return_counts=True), strict=True):
        drawn = np.zeros(size * count + 1)
        drawn[::size] = _halves(int(count))
        found = np.convolve(found, drawn)
    apart = np.abs(2 * np.arange(len(found)) - (len(found) - 1))
    return min(1.0, float(found[apart >= abs(int(sums.sum()))].sum()))


def _halves(count: int) -> np.ndarray:
    """Probability of 0 to `count` heads among as many throws of a coin."""
    ways = [
        math.lgamma(count + 1) - math.lgamma(heads + 1) - math.lgamma(count - heads + 1)
        for heads in range(count + 1)
    ]
    return np.exp(np.array(ways) - count * math.log(2))


def _tango(wins: float, losses: float, count: float) -> tuple[float, float]:
    """Bounds of the difference p(win) - p(loss): where its score test is at the edge of the 95%."""

    def beyond(difference: float) -> float:
        """Above 0 outside of the interval."""
        apart = wins - losses - count * difference
        linear = (2 * count - wins + losses) * difference - wins - losses
        constant = -losses * difference * (1 - difference)
        root = math.sqrt(max(0.0, linear**2 - 8 * count * constant))
        losing = (root - linear) / (4 * count)  # p(loss) that is likeliest, given the difference
        return apart**2 - Z95**2 * count * (2 * losing + difference * (1 - difference))

    found = (wins - losses) / count
    return _root(beyond, found, -1.0), _root(beyond, found, 1.0)


def _root(beyond: Callable[[float], float], inside: float, outside: float) -> float:
    """Where a function changes its sign, by bisection."""
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if beyond(middle) > 0 else (middle, outside)
    return (inside + outside) / 2


def _design_effect(values_A: np.ndarray, clusters_A: np.ndarray) -> float:
    count, groups = len(values_A), len(np.unique(clusters_A))
    deviations_A = values_A - np.mean(values_A)
    independent = float(np.sum(deviations_A**2)) / count**2
    if independent == 0:
        return count / groups
    return max(1.0, _variance(deviations_A, clusters_A) / independent)


def _variance(deviations_A: np.ndarray, clusters_A: np.ndarray) -> float:
    """Of a mean that these are the deviations from, over clusters."""
    _, cluster = np.unique(clusters_A, return_inverse=True)
    sums = np.bincount(cluster, weights=deviations_A)
    return float(np.sum(sums**2)) / len(deviations_A) ** 2
