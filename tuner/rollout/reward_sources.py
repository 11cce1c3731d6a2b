"""What scores answers: a reward model, several, a rule, or a sum of these.

Shapes: A answers, K reward models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tuner.config.policy_rewards import Combine
from tuner.data.conversation import Prompt
from tuner.models.reward_record import Reference
from tuner.models.reward_roles import REWARD
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs, ScoreRequest, score_sequences
from tuner.rollout.rules import Rule, rule_scores
from tuner.training.devices import Devices


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of A answers, and what they were made from."""

    total_A: np.ndarray
    """The score of each answer, float64."""
    parts: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """Of a sum: each part by name, float64 [A]."""
    models_KA: np.ndarray | None = None
    """Of an ensemble: the standardized score by each reward model, float64; None without one."""

    def figures(self) -> dict[str, float]:
        """Means to log: `score_of/NAME` of each part, and the disagreement of the reward models."""
        figures = {f"score_of/{name}": float(part_A.mean()) for name, part_A in self.parts.items()}
        if self.models_KA is not None:
            figures["disagreement"] = float(self.models_KA.std(axis=0).mean())
        return figures

    def models_of(self, index: int) -> list[float] | None:
        """The scores that the reward models of an ensemble give one answer; None without an ensemble."""
        return None if self.models_KA is None else self.models_KA[:, index].tolist()


class RewardSource(Protocol):
    """Scores answers. All ranks call it together, and each gets every score."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """Score of each answer to its prompt, float64 [A]."""
        ...

    def detailed(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Scores:
        """The same with what the scores were made from."""
        return Scores(self.score(prompts, answers))


@dataclass(frozen=True)
class ModelReward(RewardSource):
    """The reward model's score of an answer, under its prompt's condition.

    The answer's text is tokenized again, even where policy and reward model share a tokenizer: sampled tokens need
    not be those that the tokenizer makes of their text, which are what the reward model was trained on. So the score
    is the one `tuner score` gives the text.
    """

    roles: Roles
    """Has the reward model's role."""
    inputs: RewardInputs
    tokens_per_pass: int
    devices: Devices
    role: str = REWARD

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """See RewardSource."""

        def tokens_of(indices: list[int]) -> list[np.ndarray]:
            compares = self.inputs.template.needs_reference
            return self.inputs.make(
                [ScoreRequest.of(prompts[index], answers[index], compares) for index in indices]
            )

        devices, sequences = self.devices, self.devices.share_out(len(answers), tokens_of)
        with self.roles.role(self.role) as model:
            return score_sequences(
                model, sequences, self.tokens_per_pass, devices.device, by_pass=devices.by_pass
            )


@dataclass(frozen=True)
class EnsembleReward(RewardSource):
    """One score of several reward models' scores, each standardized by its own reference mean and deviation.

    Reward models that were trained apart differ in mean and scale, which no preference determines; unless they are made
    comparable, the lowest score is always that of the same model (Coste et al., arXiv 2310.02743).
    """

    sources: Sequence[RewardSource]
    references: Sequence[Reference]
    """Of each source: with a standard deviation above 0."""
    combine: Combine
    variance_coefficient: float

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """See RewardSource."""
        return self.detailed(prompts, answers).total_A

    def detailed(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Scores:
        """See RewardSource."""
        models_KA = np.stack([
            (source.score(prompts, answers) - reference.mean) / reference.standard_deviation
            for source, reference in zip(self.sources, self.references, strict=True)
        ])  # fmt: skip
        return Scores(combined(models_KA, self.combine, self.variance_coefficient), models_KA=models_KA)


@dataclass(frozen=True)
class RuleReward(RewardSource):
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
class SummedReward(RewardSource):
    """The sum of several sources' scores."""

    sources: Mapping[str, RewardSource]
    """By the name that their part of the score is logged under."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """See RewardSource."""
        return self.detailed(prompts, answers).total_A

    def detailed(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Scores:
        """See RewardSource."""
        details = {name: source.detailed(prompts, answers) for name, source in self.sources.items()}
        parts = {name: scores.total_A for name, scores in details.items()}
        ensembles = [scores.models_KA for scores in details.values() if scores.models_KA is not None]
        models_KA = ensembles[0] if ensembles else None
        return Scores(np.sum(list(parts.values()), axis=0), parts, models_KA)


def combined(models_KA: np.ndarray, combine: Combine, variance_coefficient: float) -> np.ndarray:
    """One score of each answer from those of K reward models, float64 [A].

    Coste et al. (arXiv 2310.02743), 3.2: the mean; the lowest (worst-case optimization); or the mean less a coefficient
    times the variance over the models, divided by K and not by K - 1 (uncertainty-weighted optimization).
    """
    if combine == "min":
        return models_KA.min(axis=0)
    mean_A = models_KA.mean(axis=0)
    return mean_A if combine == "mean" else mean_A - variance_coefficient * models_KA.var(axis=0)
