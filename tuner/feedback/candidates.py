"""Candidates: two answers to one prompt, of which annotators choose the better."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuner.data.answers import PROMPTS, is_number, read_condition, read_prompt
from tuner.data.conversation import Turn
from tuner.data.row_files import JSON_LINES, read_text_file
from tuner.data.turns import (
    Values,
    expect_list,
    expect_text,
    has,
    is_object,
    key_names,
    read_weight,
    refuse,
)
from tuner.errors import UserError

Decision = Literal["first", "second", "tie"]
"""Which answer is better, by its place in the row, however it was shown."""

_GOLD: dict[Any, Decision] = {0: "first", 1: "second", "tie": "tie"}
_CONTEXT = (*PROMPTS, "system", "tools", "condition")
"""Keys of a row that its preference takes over unchanged."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Two answers to one prompt."""

    id: str
    prompt: tuple[Turn, ...]
    """With the row's system prompt as its first turn."""
    answers: tuple[str, str]
    origins: tuple[str | None, str | None]
    """Where each answer comes from, such as "early" and "late"; annotators never see it."""
    condition: str | None
    """Name of the preference that the answers are judged by."""
    guideline: str | None
    """What that preference asks for, as the page shows it."""
    gold: Decision | None
    """The known answer of a planted row, by which annotators are checked."""
    weight: float
    scores: tuple[tuple[float, float], ...]
    """Of each reward model that scored the answers, both scores."""
    row: Values
    """The row as in its file."""
    origin: str
    """`file:line`, for messages."""

    def judged(self) -> str:
        """JSON of what a label is about. A guideline may be reworded without another id, a prompt or an answer not."""
        turns = [[turn.role, turn.content] for turn in self.prompt]
        return json.dumps([turns, self.answers, self.condition])

    def preference(self, chosen: int, weight: float) -> dict[str, Any]:
        """The row of a pair for a reward model; chosen: index of the better answer."""
        context = {key: self.row[key] for key in _CONTEXT if has(self.row, key)}
        sides = {"chosen": self.answers[chosen], "rejected": self.answers[1 - chosen]}
        return {"id": self.id, **context, **sides, "weight": weight * self.weight}


def read_candidates(file: Path) -> dict[str, Candidate]:
    """The candidates of a JSONL file by their ids, in order.

    Raises UserError with `file:line` for a row that is none, for an id that comes twice, and for a file without rows.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; name a JSONL file of candidates")
    if file.suffix not in JSON_LINES:
        raise UserError(
            f"{file}: candidates are read from {' or '.join(JSON_LINES)}; write them as JSON lines"
        )
    candidates: dict[str, Candidate] = {}
    for row in read_text_file(file):
        candidate = read_candidate(row.values, row.origin)
        if earlier := candidates.get(candidate.id):
            refuse(
                row.origin, f"id {candidate.id!r} is also that of {earlier.origin}; give every row its own"
            )
        candidates[candidate.id] = candidate
    if not candidates:
        raise UserError(f"{file}: no candidates; write a row for every pair of answers")
    return candidates


def read_candidate(row: Values, origin: str) -> Candidate:
    """A row as a candidate. Without an id it is named by a hash of its prompt, answers and condition."""
    prompt = read_prompt(row, origin)
    if prompt is None or "answers" not in row:
        refuse(origin, f'a candidate has "prompt" and "answers", this row has {key_names(row)}; write both')
    if not any(turn.content.strip() or turn.tool_calls for turn in prompt):
        refuse(origin, "the prompt is empty; write it, or take the row out")
    if row.get("system"):
        prompt = (Turn("system", expect_text(row["system"], '"system"', origin)), *prompt)
    texts, origins = _read_answers(row["answers"], origin)
    written_id = row.get("id")
    if isinstance(written_id, bool) or not isinstance(written_id, str | int | None) or written_id == "":
        refuse(origin, f'"id" is a text or a whole number, not {written_id!r}')
    candidate = Candidate(
        id="" if written_id is None else str(written_id),
        prompt=prompt,
        answers=texts,
        origins=origins,
        condition=read_condition(row, origin),
        guideline=_optional_text(row, "guideline", origin),
        gold=_read_gold(row, origin),
        weight=read_weight(row, origin),
        scores=_read_scores(row, origin),
        row=row,
        origin=origin,
    )
    if candidate.id:
        return candidate
    digest = hashlib.blake2b(candidate.judged().encode(), digest_size=8).hexdigest()
    return read_candidate({**row, "id": digest}, origin)


def _read_answers(value: Any, origin: str) -> tuple[tuple[str, str], tuple[str | None, str | None]]:
    """Texts and origins of the two answers, each a text or {"text", "origin"}."""
    answers = expect_list(value, '"answers"', origin)
    if len(answers) != 2:
        refuse(origin, f'"answers" has {len(answers)} entries; a candidate compares two')
    first, second = (answer if is_object(answer) else {"text": answer} for answer in answers)
    texts = tuple(
        expect_text(answer.get("text"), 'the "text" of an answer', origin) for answer in (first, second)
    )
    if texts[0] == texts[1]:
        refuse(origin, "the two answers are the same text; take the row out")
    return (texts[0], texts[1]), (
        _optional_text(first, "origin", origin),
        _optional_text(second, "origin", origin),
    )


def _read_scores(row: Values, origin: str) -> tuple[tuple[float, float], ...]:
    """`scores`: a list of two scores for each reward model."""
    if not has(row, "scores"):
        return ()
    pairs = expect_list(row["scores"], '"scores"', origin)
    if not all(isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in pairs):
        refuse(
            origin, '"scores" is a list of two numbers for each reward model, as in [[0.3, -1.2], [0.1, 0.4]]'
        )
    return tuple((float(first), float(second)) for first, second in pairs)


def _optional_text(values: Mapping[str, Any], key: str, origin: str) -> str | None:
    return expect_text(values[key], f'"{key}"', origin) if has(values, key) else None


def _read_gold(row: Values, origin: str) -> Decision | None:
    if not has(row, "gold"):
        return None
    gold = row["gold"]
    if isinstance(gold, bool | float) or not isinstance(gold, str | int) or gold not in _GOLD:
        refuse(origin, f'"gold" is 0 or 1, the index of the better answer, or "tie"; not {gold!r}')
    return _GOLD[gold]
