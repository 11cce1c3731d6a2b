"""Answers to held-out prompts, scored by the reward and by a gold rule.

Shapes: A answers, one to each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from tuner.data.prompts import PromptSet
from tuner.rollout.engine import Engine
from tuner.rollout.reward_sources import RewardSource
from tuner.rollout.rules import Rule, rule_scores
from tuner.training.devices import Devices


@dataclass(frozen=True, eq=False)
class JudgedAnswers:
    """Answers to A prompts, in their order, with their scores."""

    prompts: PromptSet
    answers: Sequence[str]
    scores_A: np.ndarray
    """Scores by the reward, under each prompt's condition, float64."""
    golds_A: np.ndarray | None
    """Scores by the gold rule, float64; None without a rule."""

    def means(self) -> dict[str, float]:
        """Mean score and gold score, over all prompts and by condition: `score`, `gold`, `score/polite`, ..."""
        means: dict[str, float] = {}
        for name, values_A in {"gold": self.golds_A, "score": self.scores_A}.items():
            if values_A is None:
                continue
            means[name] = float(values_A.mean())
            for condition, inside_A in self.conditions().items():
                means[f"{name}/{condition}"] = float(values_A[inside_A].mean())
        return means

    def conditions(self) -> dict[str, np.ndarray]:
        """Condition -> mask of the prompts under it, bool [A]; only conditions that occur."""
        return {
            name: inside_A
            for number, name in enumerate(self.prompts.condition_names)
            if (inside_A := self.prompts.conditions == number).any()
        }


@dataclass(frozen=True, eq=False)
class Answers:
    """A policy's answers to A prompts, in their order."""

    texts: Sequence[str]
    """Special tokens included, except the end token."""
    ended_A: np.ndarray
    """bool: whether the answer ended with an end token, and was not truncated at max_new_tokens."""
    lengths_A: np.ndarray
    """int64: tokens of the policy's own tokenizer, including the end token."""


def answer_held_out(
    prompts: PromptSet, engine: Engine, tokenizer: PreTrainedTokenizerBase, temperature: float
) -> Answers:
    """An engine's answers to prompts encoded for its policy.

    The noise of a sampled answer depends on the seed and the number of its prompt alone (the step is always 0), so
    that measurements before, during and after training differ by the policy only.
    """
    tokens = [prompts.tokens(index) for index in range(len(prompts))]
    answers = engine.generate(tokens, step=0, temperature=temperature)
    return Answers(
        [answer.text(tokenizer) for answer in answers],
        np.array([answer.ended for answer in answers], dtype=bool),
        np.array([len(answer.tokens) for answer in answers], dtype=np.int64),
    )


@dataclass(frozen=True)
class Judge:
    """Scores answers to a fixed set of held-out prompts."""

    prompts: PromptSet
    reward: RewardSource
    rule: Rule | None
    rule_name: str
    """The rule as the config names it, for messages."""
    devices: Devices

    def judge(self, answers: Sequence[str]) -> JudgedAnswers:
        """Scores of one answer to each prompt. Every rank scores a share of the answers; all ranks get the result.

        Raises UserError where the rule fails or gives a number outside 0..1.
        """
        prompts = [self.prompts.prompt(index) for index in range(len(self.prompts))]
        scores_A, golds_A = self.reward.score(prompts, answers), None
        if self.rule is not None:
            name = f"evaluation.rule {self.rule_name!r}"
            golds_A = rule_scores(self.rule, name, prompts, answers, self.devices, bounds=(0.0, 1.0))
        return JudgedAnswers(self.prompts, answers, scores_A, golds_A)
