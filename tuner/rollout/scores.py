"""Parts 3 and 4 of a step: what the reward model says of each answer, and what the policy learns of it.

Shapes: A answers of a rollout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from tuner.config import PPO
from tuner.losses.moments import RunningMoments
from tuner.models.roles import Roles
from tuner.models.scorer import Sequences
from tuner.rollout.rollout import Rollout
from tuner.training.answering import score_all
from tuner.training.devices import Devices


def score_answers(
    roles: Roles, sequences: Sequences, rollout: Rollout, tokens_per_pass: int, devices: Devices
) -> np.ndarray:
    """The reward model's score of every answer, float64 [A]; the same on every rank."""
    return score_all(roles, sequences, rollout.prompts, rollout.texts, tokens_per_pass, devices)


def learned_scores(
    scores_A: np.ndarray, ended_A: np.ndarray, kept: Mapping[str, float], config: PPO
) -> tuple[np.ndarray, dict[str, float]]:
    """What is added to the reward of each answer's last token, float64 [A], and the moments to go on with.

    The penalty of a missing end, the clip, then the normalisation by the run's moments, which take this step's
    scores in first. kept: the moments before, as JSON has them; {} at the start.
    """
    scores_A = scores_A - config.missing_end_penalty * ~ended_A
    if config.reward_clip is not None:
        scores_A = scores_A.clip(-config.reward_clip, config.reward_clip)
    finite_A = scores_A[np.isfinite(scores_A)]  # another spoils its own step, and must not spoil all others
    moments = RunningMoments(**kept).merged(finite_A)  # type: ignore[arg-type]
    return (moments.standardized(scores_A) if config.normalize_rewards else scores_A), asdict(moments)
