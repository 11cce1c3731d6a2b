"""The figures of several models on several tasks: one table, and its values for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuner.evaluation.contamination import Contamination
from tuner.evaluation.intervals import Interval
from tuner.evaluation.report_card.tables import Table
from tuner.evaluation.task_scores import TaskScores, difference, interval_of, interval_values


@dataclass(frozen=True)
class Column:
    """A model's figures."""

    model: str
    scores: Sequence[TaskScores]
    """The same tasks and metrics in the same order for every model."""
    before: int | None
    """Index of the model that the change is measured from; None for the first."""


@dataclass(frozen=True)
class TaskReport:
    """Models in the order of their training, others behind them."""

    columns: Sequence[Column]
    contamination: Mapping[str, Contamination] = field(default_factory=dict[str, Contamination])
    """Task -> its rows that stand in the training rows of the runs in the table; a task not compared is absent."""
    notes: Sequence[str] = ()

    def results(self) -> dict[str, Any]:
        """The figures for JSON: task -> metric -> model -> figures."""
        tasks: dict[str, Any] = {}
        for column in self.columns:
            for index, scores in enumerate(column.scores):
                values = tasks.setdefault(scores.task, {}).setdefault(scores.metric, {})
                values[column.model] = self._values(column, index)
        return {
            "tasks": tasks,
            "contamination": {
                task: {
                    "seen": int(found.seen_A.sum()),
                    "rows": len(found.seen_A),
                    "training_rows": found.training_rows,
                    "words": found.words,
                }
                for task, found in self.contamination.items()
            },
            "notes": list(self.notes),
        }

    def tables(self) -> Iterator[tuple[str, Table]]:
        """A table for each task and metric, with its title; a row for each model."""
        for index, first in enumerate(self.columns[0].scores):
            found = self.contamination.get(first.task)
            seen = "" if found is None else f", {int(found.seen_A.sum()):,} of them seen in training"
            names = ["model", "value", "change", *(["on unseen rows"] if found is not None else [])]
            rows = [self._cells(column, index)[: len(names)] for column in self.columns]
            yield f"{first.task}: {first.metric} over {first.rows:,} rows{seen}", (names, rows)

    def change(self, column: Column, index: int) -> Interval | None:
        """A figure's change from the model before, over the same rows; None for the first model."""
        if column.before is None:
            return None
        return difference(column.scores[index], self.columns[column.before].scores[index])

    def unseen(self, scores: TaskScores) -> Interval | None:
        """The figure over the rows that stand in no training row; None where none do, all do, or none was compared."""
        found = self.contamination.get(scores.task)
        if found is None or scores.values_A is None or found.seen_A.all() or not found.seen_A.any():
            return None
        return interval_of(scores.values_A[~found.seen_A])

    def _values(self, column: Column, index: int) -> dict[str, Any]:
        scores = column.scores[index]
        change, unseen = self.change(column, index), self.unseen(scores)
        return (
            interval_values(scores.value)
            | {"rows": scores.rows}
            | ({} if change is None else {"change": interval_values(change)})
            | ({} if unseen is None else {"unseen": interval_values(unseen)})
            | ({"notes": list(scores.notes)} if scores.notes else {})
        )

    def _cells(self, column: Column, index: int) -> list[Any]:
        scores = column.scores[index]
        change, unseen = self.change(column, index), self.unseen(scores)
        return [column.model, _text(scores.value), _text(change, "+"), _text(unseen)]


def _text(interval: Interval | None, sign: str = "") -> str | None:
    """A figure and its interval, or None for none. sign: "+" before positive ones, too."""
    if interval is None:
        return None
    value, low, high = (f"{number:{sign}.3f}" for number in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]".replace("-", "−")
