"""The figures of a task: one model's, and the difference between two models on the same rows.

Shapes: A rows of the task, in the same order for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuner.evaluation.intervals import Interval, mean, paired_difference, share


@dataclass(frozen=True, eq=False)
class TaskScores:
    """One model's figure by one metric of one task."""

    task: str
    metric: str
    value: Interval
    rows: int
    values_A: np.ndarray | None
    """Each row's value, float64; None where the figure is not their mean."""
    texts: Sequence[Sequence[str]] = ()
    """Each row's texts, that training rows are compared with."""
    notes: Sequence[str] = ()
    """What a reader of the figure must know, a sentence each."""


def mean_scores(
    task: str, metric: str, values_A: np.ndarray, texts: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> TaskScores:
    """The mean over rows with its 95% interval: Wilson's for values of 0 and 1, else the normal one."""
    return TaskScores(task, metric, interval_of(values_A), len(values_A), values_A, texts, notes)


def interval_of(values_A: np.ndarray) -> Interval:
    """95% interval of a mean over independent rows."""
    return (share if _are_binary(values_A) else mean)(values_A, np.arange(len(values_A)))


def difference(after: TaskScores, before: TaskScores) -> Interval | None:
    """Mean of the rows' differences with its 95% interval: paired, for both models answered the same rows.

    Tango's where all values are 0 or 1, else the normal one. None where one has no values by row.
    """
    if after.values_A is None or before.values_A is None or len(after.values_A) != len(before.values_A):
        return None
    binary = _are_binary(after.values_A) and _are_binary(before.values_A)
    gains_A = after.values_A - before.values_A
    return (paired_difference if binary else mean)(gains_A, np.arange(len(gains_A)))


def _are_binary(values_A: np.ndarray) -> bool:
    return bool(np.isin(values_A, (0, 1)).all())


def interval_values(interval: Interval) -> dict[str, Any]:
    """An interval for JSON."""
    return {"value": interval.value, "interval": [interval.low, interval.high]}
