"""What scores answers: a reward model, a rule, or a sum of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tuner.data.conversation import Prompt
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs, ScoreRequest, score_sequences
from tuner.rollout.rules import Rule, rule_scores
from tuner.training.devices import Devices


class RewardSource(Protocol):
    """Scores answers. All ranks call it together, and each gets every score."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """Score of each answer to its prompt, float64 [A]."""
        ...


@dataclass(frozen=True)
class ModelReward:
    """The reward model's score of an answer, under its prompt's condition.

    The answer's text is tokenized again, even where policy and reward model share a tokenizer: sampled tokens need
    not be those that the tokenizer makes of their text, which are what the reward model was trained on. So the score
    is the one `tuner score` gives the text.
    """

    roles: Roles
    """Has the role `reward`."""
    inputs: RewardInputs
    tokens_per_pass: int
    devices: Devices

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """See RewardSource."""

        def score_share(indices: list[int]) -> list[float]:
            requests = [ScoreRequest.of(prompts[index], answers[index]) for index in indices]
            sequences = self.inputs.make(requests)
            with self.roles.role("reward") as model:
                return score_sequences(model, sequences, self.tokens_per_pass, self.devices.device).tolist()

        return np.array(self.devices.share_out(len(answers), score_share))


@dataclass(frozen=True)
class RuleReward:
    """The score that a function of the user's gives an answer."""

    rule: Rule
    name: str
    """The field and the function as the config names them, for messages."""
    weight: float
    """Factor of its scores."""
    devices: Devices

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """See RewardSource."""
        return self.weight * rule_scores(self.rule, self.name, prompts, answers, self.devices)


@dataclass(frozen=True)
class SummedReward:
    """The sum of several sources' scores."""

    sources: Mapping[str, RewardSource]
    """By the name that their part of the score is logged under."""

    def parts(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> dict[str, np.ndarray]:
        """Score of each answer by each source, float64 [A]."""
        return {name: source.score(prompts, answers) for name, source in self.sources.items()}

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """See RewardSource."""
        return summed(self.parts(prompts, answers))


def summed(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Scores of several sources added up, float64 [A]."""
    return np.sum(list(parts.values()), axis=0)
