"""`tuner eval --tasks`: built-in tasks over long prompts."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from tuner.errors import UserError
from tuner.evaluation.context_scores import MAX_NEW_TOKENS, ContextScores, score_context
from tuner.evaluation.context_tasks import DEPTHS, refuse_unknown_tasks
from tuner.models.chat import open_chat
from tuner.models.rope import reach
from tuner.stages.run_models import usable_path
from tuner.stages.stage import Evaluation

SHORTEST = 256
"""Tokens of the shortest prompts by default: the facts and the question of `trace` need nearly as many."""


def evaluate_context(
    path: str, tasks: Sequence[str], lengths: Sequence[int] = (), *, count: int = 4, trust: bool = False
) -> Evaluation:
    """Accuracy of a run's model, or of any model with a chat template, by length of the prompt and depth of the fact.

    lengths: of prompts, in tokens; by default an eighth of what the model is meant for, and twice as long up to it.
    Raises UserError for an unknown task, before anything is loaded.
    """
    refuse_unknown_tasks(tasks)
    chat = open_chat(usable_path(path, trust=trust), trust=trust)
    lengths = sorted(lengths) or _default_lengths(reach(chat.loaded.transformer.config))
    scores = [score_context(chat, task, lengths=lengths, count=count) for task in tasks]
    return Evaluation(
        path.rstrip("/").rpartition("/")[2],
        {of_task.task: _plain(of_task) for of_task in scores},
        Group(*(_table(of_task, lengths) for of_task in scores)),
    )


def _default_lengths(longest: int | None) -> list[int]:
    if longest is None:
        raise UserError("--tasks: this model's configuration names no longest row; write --lengths")
    longest -= MAX_NEW_TOKENS
    return sorted({max(min(SHORTEST, longest), longest // part) for part in (8, 4, 2, 1)})


def _plain(scores: ContextScores) -> dict[str, object]:
    """The scores as plain values, in fractions of 1."""
    cells = scores.by("length", "depth")
    return {
        "accuracy": scores.accuracy,
        "rows": len(scores.rows),
        "by_length": {str(length): value for (length,), value in scores.by("length").items()},
        "by_language": {language: value for (language,), value in scores.by("language").items()},
        "by_length_and_depth": [
            {"length": length, "depth": depth, "accuracy": value} for (length, depth), value in cells.items()
        ],
    }


def _table(scores: ContextScores, lengths: Sequence[int]) -> Table:
    title = f"{scores.task}: {scores.accuracy:.0%} of {len(scores.rows)}"
    table = Table("depth", *(f"{length:,} tokens" for length in lengths), title=title)
    cells = scores.by("length", "depth")
    for depth in DEPTHS:
        table.add_row(f"{depth:.0%}", *(f"{cells[length, depth]:.0%}" for length in lengths))
    return table
