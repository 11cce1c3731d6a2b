"""What a policy answers to held-out prompts, and what the reward model and a rule say of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuner.config import PPO
from tuner.config.functions import Function, load_function
from tuner.data.prompts import PromptSet
from tuner.errors import UserError
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs
from tuner.training.answering import answer_all, score_all
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


@dataclass(frozen=True, eq=False)
class Answers:
    """What a policy said to A prompts, in their order."""

    texts: Sequence[str]
    """Special tokens included, but for the end token."""
    ended_A: np.ndarray
    """bool: whether it came to its end before there was no room for more."""
    lengths_A: np.ndarray
    """int64: in tokens of the policy's own, the end token among them."""


def answer_held_out(
    prompts: PromptSet, policy: Roles, end_ids: Collection[int], config: PPO, devices: Devices
) -> Answers:
    """A policy's answers to prompts that hold its own tokens, always drawn in the same way.

    The noise of an answer, where there is any, depends on the seed and its prompt's number alone.
    """
    tokens = [prompts.tokens(index) for index in range(len(prompts))]
    temperature = config.evaluation.temperature
    answers = answer_all(policy, tokens, end_ids, config, devices, step=0, temperature=temperature)
    return Answers(
        [one.text(policy.tokenizer) for one in answers],
        np.array([one.ended for one in answers], dtype=bool),
        np.array([len(one.tokens) for one in answers], dtype=np.int64),
    )


@dataclass(frozen=True)
class Judge:
    """Scores answers to held-out prompts, always the same ones."""

    prompts: PromptSet
    config: PPO
    sequences: RewardInputs
    devices: Devices
    rule: Rule | None

    def judge(self, reward: Roles, answers: Sequence[str]) -> Judged:
        """Scores of an answer to each prompt, whoever gave it; every rank takes a share, all get the result.

        Raises UserError where the rule fails.
        """
        prompts = [self.prompts.prompt(index) for index in range(len(self.prompts))]
        scores_A = score_all(
            reward, self.sequences, prompts, answers, self.config.tokens_per_pass, self.devices
        )
        return Judged(self.prompts, answers, scores_A, None if self.rule is None else self._golds(answers))

    def _golds(self, answers: Sequence[str]) -> np.ndarray:
        def gold(places: list[int]) -> list[float]:
            return [self._gold(place, answers[place]) for place in places]

        return np.array(self.devices.share_out(len(answers), gold))

    def _gold(self, index: int, answer: str) -> float:
        assert self.rule is not None
        prompt = self.prompts.prompt(index)
        name = self.config.evaluation.rule
        try:
            gold = float(self.rule(answer, prompt.values))
        except Exception as error:
            raise UserError(
                f"{prompt.origin}: evaluation.rule {name!r} failed on {answer!r:.80} "
                f"({type(error).__name__}: {error}); correct it"
            ) from error
        if not 0 <= gold <= 1:  # nor is NaN
            raise UserError(
                f"{prompt.origin}: evaluation.rule {name!r} says {gold} of {answer!r:.80}, and a gold score is from "
                "0 to 1; correct it"
            )
        return gold


def load_rule(rule: Function | None) -> Rule | None:
    """The gold rule of a config: "file.py:name". Raises UserError where it is missing or takes something else."""
    if not isinstance(rule, str):
        return None
    function = load_function(rule, "evaluation.rule")
    try:
        inspect.signature(function).bind("an answer", {})
    except TypeError as error:
        raise UserError(
            f"evaluation.rule {rule!r}: it is called with an answer and its row ({error}); write "
            f"def {rule.rpartition(':')[2]}(answer, row)"
        ) from error
    return function
