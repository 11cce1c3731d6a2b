"""Where an answer's reward comes from: a reward model, or a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tuner.data.conversation import Prompt
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs, ScoreRequest, score_sequences
from tuner.rollout.rules import Rule, rule_scores
from tuner.training.devices import Devices


class RewardSource(Protocol):
    """Scores answers; all ranks call it together and all get every score."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """Score of each answer to its prompt, float64 [A]."""
        ...


@dataclass(frozen=True)
class ModelReward:
    """The reward model's score of an answer under its prompt's condition.

    Answers go through their text, whatever the tokenizers of policy and reward model: the score is the one that
    `tuner score` gives the text.
    """

    roles: Roles
    """Has the role `reward`."""
    sequences: RewardInputs
    tokens_per_pass: int
    devices: Devices

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """See RewardSource."""

        def share(places: list[int]) -> list[float]:
            sequences = self.sequences.make(
                [ScoreRequest.of(prompts[place], answers[place]) for place in places]
            )
            with self.roles.role("reward") as model:
                return score_sequences(model, sequences, self.tokens_per_pass, self.devices.device).tolist()

        return np.array(self.devices.share_out(len(answers), share))


@dataclass(frozen=True)
class RuleReward:
    """The score of a function of the user's."""

    rule: Rule
    name: str
    """The rule as the config names it, for messages."""
    devices: Devices

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """See RewardSource."""
        return rule_scores(self.rule, self.name, prompts, answers, self.devices)
