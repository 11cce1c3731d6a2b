"""Gold score as a function of the distance from the reference, and where it turns (Gao et al., arXiv 2210.10760).

With d = sqrt(KL), KL in nats per answer, the paper's form for reinforcement learning is R(d) = d (alpha - beta log d),
where R is the gold score minus that at d = 0. It is largest at d = exp(alpha / beta - 1). Its section on iterated RLHF
has k rounds cover d / k each: R(d) = d (alpha - beta log d + beta log k), which turns at k exp(alpha / beta - 1). Both
forms are linear in alpha and beta, so that least squares has one solution.

Shapes: P points, one for each step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.evaluation.intervals import Interval
from tuner.evaluation.report_card.measures import Z95

LEAST_POINTS = 8
"""Points from which a law is fitted: it has three parameters."""
FARTHEST_PREDICTED = 1.5
"""A turning point is predicted up to this many times the largest distance of the data; beyond, a fit says nothing."""


@dataclass(frozen=True)
class Point:
    """A step of a run."""

    step: int
    distance: float
    """sqrt(KL) from the reference, KL in nats per answer."""
    gold: float
    score: float
    """Of the reward that is trained on: the proxy."""
    round: int = 1
    """Number of the round of reward model and policy, from 1."""


@dataclass(frozen=True)
class Law:
    """The law fitted to the points of one or more rounds; intervals are 95%."""

    start: Interval
    """Gold score at distance 0."""
    alpha: Interval
    beta: Interval
    deviation: float
    """Standard deviation of the gold scores around the law."""
    farthest: float
    """Largest distance of the points, each divided by the number of its round."""
    turning_point: Interval | None
    """The distance at which the gold score of a first round is largest; None where it cannot be told."""
    no_turning_point: str
    """Why it cannot be told; empty where it can."""

    def gold(self, distance: float, round_number: int = 1) -> float:
        """Gold score at a distance in a round."""
        return (
            self.start.value
            + distance * self.alpha.value
            + self.beta.value * _turning_term(distance, round_number)
        )

    def turning_point_of(self, round_number: int) -> Interval | None:
        """The turning point of a round: that of the first times its number."""
        turn, factor = self.turning_point, round_number
        return turn and Interval(turn.value * factor, turn.low * factor, turn.high * factor)


def distance(kl_per_answer: float) -> float:
    """sqrt(KL); an estimate of KL that is below 0 by chance counts as 0."""
    return math.sqrt(max(0.0, kl_per_answer))


def fit_law(points: Sequence[Point]) -> Law | None:
    """Least squares over the points, with t intervals; None where there are too few, or all at one distance.

    The gold score at distance 0 is the third parameter: no step measures it without noise.
    """
    distances_P = np.array([point.distance for point in points])
    if len(points) < LEAST_POINTS or np.ptp(distances_P) == 0:
        return None
    turning_P = [_turning_term(point.distance, point.round) for point in points]
    design_P3 = np.column_stack([np.ones(len(points)), distances_P, turning_P])
    golds_P = np.array([point.gold for point in points])
    values_3, _, rank, _ = np.linalg.lstsq(design_P3, golds_P, rcond=None)
    if rank < 3:
        return None
    residuals_P, freedom = golds_P - design_P3 @ values_3, len(points) - 3
    variance = float(residuals_P @ residuals_P) / freedom
    covariance_33 = variance * np.linalg.inv(design_P3.T @ design_P3)
    t = t_quantile(freedom)
    start, alpha, beta = (
        Interval(float(value), float(value - half), float(value + half))
        for value, half in zip(values_3, t * np.sqrt(np.diag(covariance_33)), strict=True)
    )
    farthest = max(point.distance / point.round for point in points)
    turn, reason = _turning_point(alpha, beta, t**2 * covariance_33[1:, 1:], farthest)
    return Law(start, alpha, beta, math.sqrt(variance), farthest, turn, reason)


def t_quantile(freedom: int) -> float:
    """Two-sided 95% of Student's t distribution, within 0.003 from 5 degrees of freedom on, 0.04 from 3 on.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = Z95
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _turning_term(distance: float, round_number: int) -> float:
    """What beta is multiplied with: -d log(d / k), which is 0 at d = 0."""
    return -distance * math.log(distance / round_number) if distance > 0 else 0.0


def _turning_point(
    alpha: Interval, beta: Interval, scaled_22: np.ndarray, farthest: float
) -> tuple[Interval | None, str]:
    """exp(alpha / beta - 1) with Fieller's interval (1954) of the ratio, or why it cannot be told.

    scaled_22: covariance of alpha and beta times the squared quantile. farthest: distance that the data reach.
    """
    if beta.value <= 0:
        return None, "the gold score does not bend downward in these data (beta is not above 0)"
    if beta.low <= 0:
        return (
            None,
            "whether the gold score bends downward cannot be told from noise (beta's interval holds 0)",
        )
    # The ratios that a t test of alpha - ratio * beta = 0 does not reject: bounded, since beta differs from 0.
    square = beta.value**2 - scaled_22[1, 1]
    half = alpha.value * beta.value - scaled_22[0, 1]
    root = math.sqrt(max(0.0, half**2 - square * (alpha.value**2 - scaled_22[0, 0])))
    ratios = (alpha.value / beta.value, (half - root) / square, (half + root) / square)
    # Exponents are bounded: far from 0 the point is refused below in any case.
    turn = Interval(*(math.exp(min(ratio - 1, 50.0)) for ratio in ratios))
    if turn.value > FARTHEST_PREDICTED * farthest:
        return None, (
            f"the data do not reach far enough: the law turns beyond {FARTHEST_PREDICTED:g} times their largest "
            f"distance, {farthest:.2f}"
        )
    return turn, ""
