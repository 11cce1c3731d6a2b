"""Rows of a task of one's own: a prompt, and what tells a right answer.

| keys | what is measured |
| --- | --- |
| a prompt, `choices`, `answer` | the choice with the highest likelihood; `answer` is its index from 0, or its text |
| a prompt, `answer` (or `reference`, or a last assistant turn) | the generated answer, compared by `match` |
| a prompt, `regex` | whether the generated answer holds a match |
| `question`, `answer` with `####` | GSM8K: `match` is "number" |
| `problem`, `solution` or `answer` | MATH: `match` is "math" |

A prompt is `prompt`, `question` or `messages`, and all other forms of docs/data.md; `system` is put before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.config import Source
from tuner.data.conversation import Prompt
from tuner.data.prompt_rows import prompt_reader
from tuner.data.row_files import Row
from tuner.data.sources import Rows
from tuner.data.turns import Values, expect_list, expect_text, has, refuse, untyped
from tuner.errors import UserError
from tuner.evaluation.final_answers import equal_expressions, equal_numbers

MATCHES: Mapping[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, reference: answer.strip() == reference.strip(),
    "number": equal_numbers,
    "math": equal_expressions,
    "regex": lambda answer, reference: re.search(reference, answer) is not None,
}
"""Name -> whether a generated answer is right, given the reference."""
_OURS = ("choices", "answer", "reference", "regex", "match", "problem", "solution")


@dataclass(frozen=True)
class TaskRow:
    """One row of a task."""

    prompt: Prompt
    choices: tuple[str, ...]
    """Answers to choose from by their likelihood; empty where the answer is generated."""
    right: int | None
    """Index of the right choice."""
    references: tuple[str, ...]
    """Right answers, each of which counts; of `match="regex"` the pattern."""
    match: str
    """How a generated answer is compared; one of MATCHES."""

    def accepts(self, answer: str) -> bool:
        """Whether a generated answer is right."""
        return any(MATCHES[self.match](answer, reference) for reference in self.references)

    @property
    def texts(self) -> list[str]:
        """All that a model may have seen of the row in training: not a system turn, which asks nothing."""
        references = () if self.match == "regex" else self.references
        return [*(turn.content for turn in self.prompt.turns if turn.role != "system"), *references]


def read_task(path: str, limit: int | None = None) -> list[TaskRow]:
    """The rows of a file. Raises UserError with `file:line` for one that is no task's."""
    reader = prompt_reader(None)
    return [_read(row, reader.read) for row in Rows(Source(path=path, limit=limit))]


def _read(row: Row, read_prompt: Callable[[Values, str], Prompt]) -> TaskRow:
    values, origin = row.values, row.origin
    rest: dict[str, Any] = {key: value for key, value in values.items() if key not in _OURS}
    if has(values, "problem"):
        rest["prompt"] = values["problem"]
    prompt = read_prompt(rest, origin)
    if has(values, "choices"):
        choices = tuple(
            expect_text(choice, "a choice", origin)
            for choice in expect_list(values["choices"], '"choices"', origin)
        )
        right = _right_choice(untyped(values.get("answer")), choices, origin)
        return TaskRow(prompt, choices, right, (choices[right],), "exact")
    if has(values, "regex"):
        pattern = expect_text(values["regex"], '"regex"', origin)
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f'{origin}: "regex" is no pattern ({error}); correct it') from error
        return TaskRow(prompt, (), None, (pattern,), "regex")
    references = _references(values, prompt, origin)
    match = values.get("match") or _usual_match(values, references)
    if match not in MATCHES or match == "regex":
        refuse(origin, f'"match" is exact, number or math, not {match!r}; a pattern is written as "regex"')
    return TaskRow(prompt, (), None, references, match)


def _right_choice(answer: Any, choices: tuple[str, ...], origin: str) -> int:
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if len(choices) < 2 or isinstance(answer, bool) or not isinstance(answer, int):
        refuse(origin, '"answer" is the index (from 0) or the text of one of two or more "choices"')
    if not 0 <= answer < len(choices):
        refuse(origin, f'"answer" {answer} is no index of {len(choices)} choices; count from 0')
    return answer


def _references(values: Values, prompt: Prompt, origin: str) -> tuple[str, ...]:
    key = next((key for key in ("answer", "reference", "solution") if has(values, key)), None)
    value = prompt.reference if key is None else values[key]
    texts = value if isinstance(value, list) else [] if value is None else [value]
    references = tuple(
        str(text) if isinstance(text, int | float) else expect_text(text, f'"{key or "answer"}"', origin)
        for text in texts
    )
    if not references or not all(text.strip() for text in references):
        refuse(origin, 'no right answer; write it as "answer", or end "messages" with the assistant\'s turn')
    return references


def _usual_match(values: Values, references: tuple[str, ...]) -> str:
    if has(values, "problem"):
        return "math"
    return (
        "number"
        if has(values, "question") and all("\n#### " in f"\n{text}" for text in references)
        else "exact"
    )
