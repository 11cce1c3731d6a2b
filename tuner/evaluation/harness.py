"""Tasks of lm-evaluation-harness, put to models through tuner's engine. The harness is installed by `tuner[eval]`."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tuner.errors import UserError
from tuner.evaluation.intervals import Interval
from tuner.evaluation.report_card.measures import Z95
from tuner.evaluation.task_model import TaskModel
from tuner.evaluation.task_scores import TaskScores, interval_of

_BOOTSTRAPS = 1_000
"""Resamples for standard errors that have no formula; the harness's default of 100,000 takes minutes."""


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks, groups and tags of lm-evaluation-harness by their names, or a task's own YAML file."""

    names: Sequence[str]
    limit: int | None
    shots: int | None
    own_rules: bool
    """Contexts are split and begun as the harness's `hf` model does."""

    def checked(self) -> HarnessTasks:
        """Itself. Raises UserError where the harness is not installed, a task is unknown or its rows are not here."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                f"{self.names[0]}: neither a file of rows nor known without lm-evaluation-harness; install it with "
                "`pip install 'tuner[eval]'`"
            )
        for name in self.names:
            try:
                self._manager.load([name])
            except KeyError as error:
                raise UserError(
                    f"{name}: lm-evaluation-harness has no such task; `python -m lm_eval ls tasks` lists them"
                ) from error
            except (OSError, ValueError, ImportError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise UserError(
                    f"{name}: its rows cannot be loaded ({type(error).__name__}: {reason}); "
                    "lm-evaluation-harness takes them from the Hugging Face hub"
                ) from error
        return self

    def measure(self, model: TaskModel) -> list[TaskScores]:
        """The model's figures, task by task and metric by metric; of a group with figures of its own those alone."""
        import lm_eval  # pyright: ignore[reportMissingImports]

        from tuner.evaluation.harness_model import HarnessModel

        harness_model = HarnessModel(model, self.own_rules)
        try:
            evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its parameters from type checkers
            results = evaluate(
                harness_model,
                tasks=list(self.names),
                num_fewshot=self.shots,
                limit=self.limit,
                apply_chat_template=model.template is not None,
                bootstrap_iters=_BOOTSTRAPS,
                task_manager=self._manager,
            )
        except ValueError as error:  # a task that runs code of models, or takes pictures
            raise UserError(f"lm-evaluation-harness: {error}") from error
        notes = [
            f"Answers are greedy, where a task asks for {text}" for text in sorted(harness_model.sampled)
        ]
        return [scores for name in _shown(results) for scores in _scores(results, name, notes)]

    @cached_property
    def _manager(self) -> Any:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        # reading the names of its own tasks takes longer than a small task
        return TaskManager(include_defaults=not all(Path(name).is_file() for name in self.names))


def _shown(results: Mapping[str, Any]) -> list[str]:
    """Tasks and groups with figures that are in no group with figures."""
    groups: Mapping[str, Sequence[str]] = results.get("group_subtasks") or {}
    inside = {task for group, tasks in groups.items() if _figures(results, group) for task in tasks}
    return [name for name in results["results"] if name not in inside and _figures(results, name)]


def _figures(results: Mapping[str, Any], name: str) -> dict[str, float]:
    """ "metric,filter" -> value."""
    values: Mapping[str, Any] = results["results"].get(name) or {}
    return {
        key: float(value)
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }


def _scores(results: Mapping[str, Any], name: str, notes: Sequence[str]) -> Iterator[TaskScores]:
    tasks = _tasks_in(results, name)
    samples = [sample for task in tasks for sample in _in_order(results["samples"].get(task, ()))]
    for key, value in _figures(results, name).items():
        metric, _, filter_name = key.partition(",")
        rows = [sample for sample in samples if sample["filter"] == filter_name]
        values_A = _values(rows, metric, value)
        shown = metric if filter_name == "none" else f"{metric} ({filter_name})"
        interval = _interval(value, results["results"][name].get(f"{metric}_stderr,{filter_name}"), values_A)
        texts = [list(_texts(sample["doc"])) for sample in rows]
        yield TaskScores(name, shown, interval, len(rows), values_A, texts, notes)


def _tasks_in(results: Mapping[str, Any], name: str) -> list[str]:
    """The tasks that a name stands for."""
    inside = (results.get("group_subtasks") or {}).get(name)
    return [task for part in inside for task in _tasks_in(results, part)] if inside else [name]


def _in_order(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(samples, key=lambda sample: sample["doc_id"])


def _values(rows: Sequence[Mapping[str, Any]], metric: str, mean: float) -> np.ndarray | None:
    """Each row's value of a metric; None where they are no numbers, or the figure is not their mean."""
    values = [row.get(metric) for row in rows]
    if not values or not all(isinstance(value, int | float | np.number) for value in values):
        return None
    values_A = np.array(values, np.float64)
    return values_A if np.isclose(values_A.mean(), mean) else None


def _interval(value: float, error: Any, values_A: np.ndarray | None) -> Interval:
    """Wilson's interval of a share of rows; else by the harness's standard error, without a width where it has none."""
    if values_A is not None and np.isin(values_A, (0, 1)).all():
        return interval_of(values_A)
    half = Z95 * error if isinstance(error, float) else 0.0
    return Interval(value, value - half, value + half)


def _texts(value: Any) -> Iterator[str]:
    """All texts of a task's row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
