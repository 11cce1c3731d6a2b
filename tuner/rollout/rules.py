"""Rules: functions of the user's that score an answer by code."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tuner.config.functions import Function, load_function
from tuner.data.conversation import Prompt
from tuner.errors import UserError
from tuner.training.devices import Devices

Rule = Callable[[str, Mapping[str, Any]], float]
"""(answer, the prompt's row with its condition) -> score."""


def load_rule(reference: Function | None, field: str) -> Rule | None:
    """The rule that a config's `field` names as "file.py:name"; None for None.

    Raises UserError where it is missing or does not take an answer and a row.
    """
    if not isinstance(reference, str):
        return None
    function = load_function(reference, field)
    try:
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
    """Score of every answer, float64 [A]; each rank scores a share, all get all.

    name: the field and function, for messages. Raises UserError, naming the prompt's row, where the rule fails, or
    gives no finite number within the bounds.
    """

    def share(places: list[int]) -> list[float]:
        return [_score(rule, name, prompts[place], answers[place], bounds) for place in places]

    return np.array(devices.share_out(len(answers), share), dtype=np.float64)


def _score(rule: Rule, name: str, prompt: Prompt, answer: str, bounds: tuple[float, float]) -> float:
    low, high = bounds
    try:
        score = float(rule(answer, prompt.values))
    except Exception as error:
        raise UserError(
            f"{prompt.origin}: {name} failed on {answer!r:.80} ({type(error).__name__}: {error}); correct it"
        ) from error
    if not (low <= score <= high and math.isfinite(score)):
        wanted = "a finite number" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise UserError(
            f"{prompt.origin}: {name} returned {score} for {answer!r:.80}, and a score is {wanted}; correct it"
        )
    return score
