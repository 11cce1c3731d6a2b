"""From scores to what the policy is rewarded with: truncation penalty, clipping, normalization.

Shapes: A answers of a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

EPSILON = 1e-8
"""Added to the spread of the scores before they are divided by it."""


@dataclass(frozen=True)
class ScoreMoments:
    """Running count, mean and summed squared deviation of all scores of a run (Chan, Golub & LeVeque, 1983)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def merged(self, values: np.ndarray) -> ScoreMoments:
        """With some more values taken in."""
        if not len(values):
            return self
        mean = float(values.mean())
        squares, count = float(((values - mean) ** 2).sum()), self.count + len(values)
        apart = mean - self.mean
        return ScoreMoments(
            count,
            self.mean + apart * len(values) / count,
            self.squares + squares + apart**2 * self.count * len(values) / count,
        )

    @property
    def spread(self) -> float:
        """Standard deviation of the values, not of a population they were drawn from."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def standardised(self, values: np.ndarray) -> np.ndarray:
        return (values - self.mean) / (self.spread + EPSILON)


def shape_scores(
    scores_A: np.ndarray,
    ended_A: np.ndarray,
    moments: Mapping[str, float],
    *,
    missing_end_penalty: float,
    clip: float | None,
    normalize: bool,
) -> tuple[np.ndarray, dict[str, float]]:
    """Shaped score of each answer, float64 [A], and the run's moments after this step, as JSON has them.

    First the truncation penalty, then the clip, then the normalization by the run's moments, which take this step's
    scores in before they are used. moments: those before the step; {} at the start of a run.
    """
    scores_A = scores_A - missing_end_penalty * ~ended_A
    if clip is not None:
        scores_A = scores_A.clip(-clip, clip)
    finite_A = scores_A[
        np.isfinite(scores_A)
    ]  # another value spoils its own step, and must not spoil all later ones
    running = ScoreMoments(**moments).merged(finite_A)  # type: ignore[arg-type]
    return (running.standardised(scores_A) if normalize else scores_A), asdict(running)
