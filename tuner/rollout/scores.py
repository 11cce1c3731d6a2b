"""Parts 3 and 4 of a step: what the reward model says of each answer, and what the policy learns of it.

Shapes: A answers of a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from tuner.config import PPO
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs
from tuner.rollout.rollout import Rollout
from tuner.training.answering import score_all
from tuner.training.devices import Devices

EPSILON = 1e-8
"""Added to the spread of the scores before they are divided by it."""


def score_answers(
    roles: Roles, sequences: RewardInputs, rollout: Rollout, tokens_per_pass: int, devices: Devices
) -> np.ndarray:
    """The reward model's score of every answer, float64 [A]; the same on every rank."""
    return score_all(roles, sequences, rollout.prompts, rollout.texts, tokens_per_pass, devices)


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
    moments = ScoreMoments(**kept).merged(finite_A)  # type: ignore[arg-type]
    return (moments.standardised(scores_A) if config.normalize_rewards else scores_A), asdict(moments)
