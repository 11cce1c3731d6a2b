"""What a policy answers to held-out prompts, and what the reward model and a rule say of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuner.config import PPO
from tuner.config.part import load_function
from tuner.data.packing import deal
from tuner.data.prompts import PromptSet
from tuner.errors import UserError
from tuner.models.generate import generate, uniforms
from tuner.models.roles import Roles
from tuner.models.scorer import Asked, Sequences, score_sequences
from tuner.training.devices import Devices

Rule = Callable[[str, Mapping[str, Any]], float]
"""(answer, the prompt's row with its condition) -> gold score in 0..1."""


@dataclass(frozen=True, eq=False)
class Judged:
    """Answers to A prompts, in their order, with their scores."""

    prompts: PromptSet
    answers: Sequence[str]
    scores_A: np.ndarray
    """The reward model's, under each prompt's condition, float64."""
    golds_A: np.ndarray | None
    """The rule's, float64; None without a rule."""

    def means(self) -> dict[str, float]:
        """Mean score and gold score, over all prompts and by condition: `score`, `gold`, `score/polite`, ..."""
        given = {"gold": self.golds_A, "score": self.scores_A}
        means: dict[str, float] = {}
        for name, values_A in given.items():
            if values_A is None:
                continue
            means[name] = float(values_A.mean())
            for condition, chosen_A in self.conditions().items():
                means[f"{name}/{condition}"] = float(values_A[chosen_A].mean())
        return means

    def conditions(self) -> dict[str, np.ndarray]:
        """Condition -> which prompts are asked under it, bool [A]; those that occur."""
        return {
            name: chosen_A
            for number, name in enumerate(self.prompts.condition_names)
            if (chosen_A := self.prompts.conditions == number).any()
        }


@dataclass(frozen=True)
class Judge:
    """Asks a policy held-out prompts, always the same and in the same way, and scores its answers."""

    prompts: PromptSet
    config: PPO
    sequences: Sequences
    devices: Devices
    rule: Rule | None

    def ask(self, policy: Roles, reward: Roles, end_ids: Collection[int]) -> Judged:
        """Answers and scores; every rank takes a share, all get the result. One value may play both parts.

        Raises UserError where the rule fails.
        """
        own = deal(range(len(self.prompts)), self.devices.rank, self.devices.world)
        answered = self._answers(policy, own, end_ids) if own else []
        found: list[tuple[int, str, float, float | None]] = []
        if own:
            scores = self._scores(reward, own, answered)
            golds = [self._gold(index, answer) for index, answer in zip(own, answered, strict=True)]
            found = list(zip(own, answered, scores, golds, strict=True))
        everyone = sorted(self.devices.gather(found), key=lambda one: one[0])
        _, answers, scores, golds = zip(*everyone, strict=True)
        return Judged(
            self.prompts, answers, np.array(scores), np.array(golds) if self.rule is not None else None
        )

    def _answers(self, policy: Roles, own: Sequence[int], end_ids: Collection[int]) -> list[str]:
        sampling, temperature = self.config.sampling, self.config.evaluation.temperature
        noise = uniforms(self.config.seed, 0, own, sampling.max_new_tokens) if temperature else None
        with policy.role("policy") as model:
            answers = generate(
                model,
                [self.prompts.tokens(index).tolist() for index in own],
                max_new_tokens=sampling.max_new_tokens,
                temperature=temperature,
                top_p=sampling.top_p,
                end_ids=end_ids,
                noise=noise,
                cache_bytes=int(sampling.cache_gib * 2**30),
            )
        return [
            policy.tokenizer.decode(answer.content.tolist(), skip_special_tokens=False) for answer in answers
        ]

    def _scores(self, reward: Roles, own: Sequence[int], answers: Sequence[str]) -> list[float]:
        prompts = [self.prompts.prompt(index) for index in own]
        asked = [
            Asked(prompt.answered(answer), prompt.condition, prompt.turns)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        made = self.sequences.make(asked)
        with reward.role("reward") as model:
            return score_sequences(model, made, self.config.tokens_per_pass, self.devices.device).tolist()

    def _gold(self, index: int, answer: str) -> float | None:
        if self.rule is None:
            return None
        prompt = self.prompts.prompt(index)
        try:
            return float(self.rule(answer, prompt.values))
        except Exception as error:
            raise UserError(
                f"{prompt.origin}: evaluation.rule {self.config.evaluation.rule!r} failed on {answer!r:.80} "
                f"({type(error).__name__}: {error}); correct it"
            ) from error


def load_rule(name: str | None) -> Rule | None:
    """The gold rule of a config: "file.py:name"."""
    return None if not isinstance(name, str) else load_function(name, "evaluation.rule")
