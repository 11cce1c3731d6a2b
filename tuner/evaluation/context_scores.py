"""Scores of a model on context tasks, by the length of the prompt and the depth of the fact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuner.data.conversation import Conversation, Turn
from tuner.evaluation.context_tasks import DEPTHS, ContextRow, context_rows
from tuner.models.chat import ChatModel
from tuner.models.generate import generate

MAX_NEW_TOKENS = 64
"""Room for an answer in a sentence, or one that goes along a chain."""


@dataclass(frozen=True)
class ContextScores:
    """The rows of a task, and whether each was answered."""

    task: str
    rows: Sequence[ContextRow]
    right: Sequence[bool]

    @property
    def accuracy(self) -> float:
        """Fraction of all rows that were answered."""
        return sum(self.right) / len(self.right)

    def by(self, *fields: str) -> dict[tuple[object, ...], float]:
        """Values of some of a row's fields -> fraction of such rows that were answered."""
        groups: dict[tuple[object, ...], list[bool]] = {}
        for row, right in zip(self.rows, self.right, strict=True):
            groups.setdefault(tuple(getattr(row, field) for field in fields), []).append(right)
        return {key: sum(values) / len(values) for key, values in groups.items()}


def score_context(
    chat: ChatModel,
    task: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    count: int = 4,
    seed: int = 0,
) -> ContextScores:
    """Greedy answers to a task's rows; right where the answer contains the value that was asked for, as in RULER."""

    def tokens(prompt: str) -> list[int]:
        turns = (Turn("user", prompt),)
        return chat.template.render_prompt(Conversation(turns, origin=task))

    rows = list(
        context_rows(
            task,
            lambda prompt: len(tokens(prompt)),
            lengths=lengths,
            depths=depths,
            count=count,
            seed=seed,
        )
    )
    answers = generate(
        chat.loaded.model,
        [tokens(row.prompt) for row in rows],
        max_new_tokens=MAX_NEW_TOKENS,
        end_ids=chat.end_ids,
    )
    texts = [answer.text(chat.loaded.tokenizer) for answer in answers]
    return ContextScores(task, rows, [row.answer in text for row, text in zip(rows, texts, strict=True)])
