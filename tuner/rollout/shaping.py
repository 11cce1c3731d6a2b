"""From scores to shaped scores, which the policy is rewarded with: penalties, clip, normalization.

Shapes: A answers of a rollout, M answers of the reference policy to the prompt of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

import numpy as np

from tuner.config import LengthPenalty, PreferenceReward
from tuner.losses.moments import RunningMoments


def shape_scores(
    scores_A: np.ndarray,
    ended_A: np.ndarray,
    moments: Mapping[str, float],
    *,
    missing_end_penalty: float,
    length_penalties_A: np.ndarray | float = 0.0,
    clip: float | None,
    normalize: bool,
    preference: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, dict[str, float]]:
    """Shaped score of each answer, float64 [A], and the run's moments after this step, as plain values for JSON.

    First the penalties, then the clip, then the normalization by the run's moments. Those include this step's
    scores, so that the first step is normalized, too. moments: those before the step; {} at the start of a run.
    preference: from penalized scores to preference probabilities, where those are the reward; before the clip.
    """
    scores_A = penalized(scores_A, ended_A, missing_end_penalty, length_penalties_A)
    if preference is not None:
        scores_A = preference(scores_A)
    if clip is not None:
        scores_A = scores_A.clip(-clip, clip)
    # A NaN from the reward model makes losses of this step NaN, and their updates are skipped. In the running moments
    # it would make every later score NaN, too.
    finite_A = scores_A[np.isfinite(scores_A)]
    running = RunningMoments.from_dict(moments).merged(finite_A)
    return (running.standardized(scores_A) if normalize else scores_A), asdict(running)


def penalized(
    scores_A: np.ndarray,
    ended_A: np.ndarray,
    missing_end_penalty: float,
    length_penalties_A: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Scores less the penalties on a missing end and on length, float64 [A]. ended_A: bool."""
    # ~ negates booleans only: of the integers 0 and 1 it makes -1 and -2.
    return scores_A - missing_end_penalty * ~ended_A - length_penalties_A


def preferences(scores_A: np.ndarray, references_AM: np.ndarray, settings: PreferenceReward) -> np.ndarray:
    """How likely each answer is preferred to the reference's, float64 [A], from 0 to 1.

    The mean over the reference's answers of sigmoid(slope · (score - reference's score)): "Preference As Reward"
    (arXiv 2502.18770), as its authors' code has it. The mean of sigmoids, not the sigmoid of a mean: each is the
    probability of Bradley and Terry that the answer wins against one of the reference's.
    """
    differences_AM = settings.slope * (scores_A[:, None] - references_AM)
    # a sigmoid that cannot overflow
    return (0.5 * (1 + np.tanh(differences_AM / 2))).mean(axis=1)


def length_penalties(lengths_A: np.ndarray, penalty: LengthPenalty | None) -> np.ndarray:
    """What each answer's length costs, float64 [A]; lengths_A: in tokens, int64."""
    if penalty is None:
        return np.zeros(len(lengths_A))
    return penalty.per_token * np.maximum(lengths_A - penalty.above, 0).astype(np.float64)
