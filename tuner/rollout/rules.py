"""Rules: the user's functions that score an answer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tuner.config.functions import Function, load_function
from tuner.data.conversation import Prompt
from tuner.errors import UserError

if TYPE_CHECKING:
    # labels by a rule need no torch
    from tuner.training.devices import Devices

Rule = Callable[[str, Mapping[str, Any]], float]
"""(answer, the prompt's row with its condition) -> score."""


def load_rule(reference: Function | None, field: str) -> Rule | None:
    """The rule that a config's `field` names as "file.py:name"; None for None.

    Raises UserError where the function is missing or does not take an answer and a row.
    """
    if not isinstance(reference, str):
        return None
    function = load_function(reference, field)
    try:
        # Now: a wrong signature would otherwise fail only after the first rollout has been generated.
        inspect.signature(function).bind("an answer", {})
    except TypeError as error:
        raise UserError(
            f"{field} {reference!r}: it is called with an answer and its row ({error}); write "
            f"def {reference.rpartition(':')[2]}(answer, row)"
        ) from error
    return function


def rule_scores(
    rule: Rule,
    name: str,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    devices: Devices,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> np.ndarray:
    """Score of each answer, float64 [A]; each rank scores a share and gets them all.

    name: the field and function, for messages. Raises UserError, naming the prompt's row, where the rule raises, or
    returns anything but a finite number within the bounds: a rule is code that can be corrected, unlike a reward
    model, whose NaN only costs a step.
    """

    def score_share(indices: list[int]) -> list[float]:
        return [
            score_answer(
                rule, name, answers[index], prompts[index].values, prompts[index].origin, bounds=bounds
            )
            for index in indices
        ]

    return np.array(devices.share_out(len(answers), score_share), dtype=np.float64)


def score_answer(
    rule: Rule,
    name: str,
    answer: str,
    row: Mapping[str, Any],
    origin: str,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> float:
    """The rule's score of an answer to a row's prompt. origin: the row's `file:line`. Raises as `rule_scores` does."""
    low, high = bounds
    try:
        score = float(rule(answer, row))
    except Exception as error:
        raise UserError(
            f"{origin}: {name} failed on {answer!r:.80} ({type(error).__name__}: {error}); correct it"
        ) from error
    if not (low <= score <= high and math.isfinite(score)):
        expected = "a finite number" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise UserError(
            f"{origin}: {name} returned {score} for {answer!r:.80}, and a score is {expected}; correct it"
        )
    return score
