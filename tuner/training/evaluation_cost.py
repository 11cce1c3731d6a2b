"""What evaluations cost: how many of them are affordable by default, and a sentence where they take much of a run."""

from __future__ import annotations

import math

LARGE_SHARE = 0.1
"""Share of a run that evaluations should cost at most."""
SECONDS_AT_LEAST = 10.0
"""Evaluations that take less than this together are worth no sentence."""
DEFAULT_EVALUATIONS = 10
"""Evaluations over a run, where they are affordable."""
BACKWARD_COST = 3
"""Cost of a token that is trained on, in tokens of a forward pass: the backward pass costs twice the forward pass."""
DECODING_COST = 200
"""Cost of a decoding step, in tokens of a forward pass. A step reads all weights; while an H100 reads a weight in bf16,
it computes the products of 200 to 300 tokens with it (990 TFLOP/s over 3.35 TB/s)."""


def evaluation_interval(total_steps: int, evaluation_tokens: float, training_tokens: float) -> int:
    """Steps between evaluations where the config names none: a function of the data alone, so that runs repeat.

    evaluation_tokens: passed forward in one evaluation. training_tokens: trained on in the whole run, in the same unit.
    """
    affordable = int(LARGE_SHARE * BACKWARD_COST * training_tokens / max(evaluation_tokens, 1))
    if affordable >= DEFAULT_EVALUATIONS:
        return max(1, total_steps // DEFAULT_EVALUATIONS)
    return math.ceil(total_steps / max(1, affordable))


def interval_sentences(total_steps: int, interval: int) -> list[str]:
    """What follows from an interval that `evaluation_interval` gives, where it is longer than a tenth of the run."""
    evaluations = math.ceil(total_steps / interval)
    if interval <= max(1, total_steps // DEFAULT_EVALUATIONS):
        return []
    times = "once, at the end of" if evaluations == 1 else f"{evaluations} times over"
    return [
        f"held-out rows are evaluated {times} the run: {DEFAULT_EVALUATIONS} evaluations would cost more than a tenth "
        "of it (evaluation.every sets how often, evaluation.rows on how many rows)"
    ]


class EvaluationCost:
    """The time that evaluations during training take."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._is_known = False

    def add(self, seconds: float, run_seconds: float) -> list[str]:
        """Count an evaluation, in a run that began so long ago; returns a sentence once, where they cost much."""
        self._seconds += seconds
        share = self._seconds / max(run_seconds, self._seconds)
        if self._is_known or share <= LARGE_SHARE or self._seconds < SECONDS_AT_LEAST:
            return []
        self._is_known = True
        return [
            f"evaluations have taken {share:.0%} of the time so far ({self._seconds:.0f} of {run_seconds:.0f} s); "
            "a larger evaluation.every or a smaller evaluation.rows makes them cheaper"
        ]
