"""A task from a file of one's own rows: choices by their likelihood, answers by generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.data.examples import Sample, tokenize
from tuner.evaluation.task_model import TaskModel
from tuner.evaluation.task_rows import TaskRow
from tuner.evaluation.task_scores import TaskScores, mean_scores

Answerer = Callable[[TaskModel, Sequence[TaskRow], int], list[str]]
"""(model, rows, most new tokens) -> the answers."""


def greedy_answers(model: TaskModel, rows: Sequence[TaskRow], max_new_tokens: int) -> list[str]:
    """The greedy answer to every row's prompt."""
    prompts = [model.encode(model.prompt_text(row.prompt.policy_input())) for row in rows]
    return model.answers(prompts, max_new_tokens)


@dataclass(frozen=True)
class LocalTask:
    """Rows that a model chooses an answer to, or generates one."""

    name: str
    rows: Sequence[TaskRow]
    max_new_tokens: int
    answer: Answerer = greedy_answers

    def measure(self, model: TaskModel) -> list[TaskScores]:
        """The share of rows that are answered rightly."""
        chosen = [place for place, row in enumerate(self.rows) if row.choices]
        written = [place for place, row in enumerate(self.rows) if not row.choices]
        values_A = np.zeros(len(self.rows))
        values_A[chosen] = _choose(model, [self.rows[place] for place in chosen])
        rows = [self.rows[place] for place in written]
        answers = self.answer(model, rows, self.max_new_tokens)
        values_A[written] = [row.accepts(text) for row, text in zip(rows, answers, strict=True)]
        return [mean_scores(self.name, "accuracy", values_A, [row.texts for row in self.rows])]


def _choose(model: TaskModel, rows: Sequence[TaskRow]) -> list[bool]:
    """Whether the choice with the highest likelihood is the right one; of equal ones the first counts."""
    samples = [_choice(model, row, choice) for row in rows for choice in row.choices]
    logprobs = iter(model.logprobs(samples))
    return [int(np.argmax([next(logprobs)[0] for _ in row.choices])) == row.right for row in rows]


def _choice(model: TaskModel, row: TaskRow, choice: str) -> Sample:
    """A choice as the answer. In a template its end token counts, as in training: else "1" always beats "12"."""
    if model.template is None:
        return model.continuation(model.prompt_text(row.prompt.policy_input()), choice)
    conversation = row.prompt.with_answer(choice)
    return tokenize([model.template.render(conversation)], model.loaded.tokenizer)[0]  # type: ignore[arg-type]
