"""What GRPO and RLOO share: several answers per prompt, and a baseline from the answers of the same group.

Shapes: A answers of the rollout, S answers of a packed row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from tuner.algorithms.algorithm import Algorithm
from tuner.config import GRPO, RLOO
from tuner.rollout.experience import Experience, Rewarded
from tuner.training.devices import Devices

Config = TypeVar("Config", GRPO, RLOO)


class GroupAlgorithm(Algorithm[Config]):
    """An answer has one advantage, which all of its tokens share."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.answers_per_prompt = config.answers_per_prompt
        # Without a KL penalty or limit no reference is loaded, and its forward pass is saved; one that the config names
        # is, for KL is measured from it.
        measures_kl = config.kl or config.max_kl or config.reference or config.alarms.kl != "warn"
        self.roles = ("reference",) if measures_kl else ()

    def estimate(
        self, rewarded: Sequence[Rewarded], rewards_A: np.ndarray, devices: Devices
    ) -> Sequence[Experience]:
        advantages_A = self.advantages(rewards_A)
        return [self.experience(row, advantages_A[row.row.answers]) for row in rewarded]

    @abstractmethod
    def advantages(self, rewards_A: np.ndarray) -> np.ndarray:
        """Advantage of each answer of the whole rollout, float64 [A]; groups are consecutive answers."""

    @abstractmethod
    def experience(self, row: Rewarded, advantages_S: np.ndarray) -> Experience:
        """A row with the advantages of its answers, float64 [S]."""
