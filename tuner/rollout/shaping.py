"""From scores to what the policy is rewarded with: truncation penalty, clipping, normalization.

Shapes: A answers of a rollout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from tuner.losses.moments import RunningMoments


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
    running = RunningMoments(**moments).merged(finite_A)  # type: ignore[arg-type]
    return (running.standardized(scores_A) if normalize else scores_A), asdict(running)
