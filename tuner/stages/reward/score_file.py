"""A file of rows to the same rows with their scores, in windows, so that its size does not matter."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any, TextIO

from tuner.config import Source
from tuner.data.conversation import Document, Preference
from tuner.data.conversation_rows import SHAPES as CONVERSATIONS
from tuner.data.preference_rows import SHAPES as PREFERENCES
from tuner.data.row_shapes import Reader
from tuner.data.sources import Row, Rows
from tuner.display.progress import progress_bar
from tuner.errors import UserError
from tuner.models.load import Precision
from tuner.models.scorer import ScoreRequest, open_scorer, prompt_of

WINDOW = 2048
"""Rows read ahead, so that passes can be filled."""

Asking = tuple[Row, list[ScoreRequest], tuple[int, ...] | None]
"""A row, what is scored for it, and which of these its answers are, in its order; None for one conversation."""


def score_file(
    model: str,
    file: str,
    output: TextIO,
    *,
    condition: str | None = None,
    standardize: bool = False,
    template: str = "tokenizer",
    precision: Precision | None = None,
    tokens_per_pass: int = 16_384,
) -> int:
    """Write each row with "score", or with "scores" of its answers in their order; returns how many there were.

    standardize: scores in standard deviations from the mean of the held-out scores. Raises UserError with `file:line`
    for bad rows, and where there is no such mean.
    """
    rows = Rows(Source(path=file))
    scorer = open_scorer(model, precision=precision, template=template, tokens_per_pass=tokens_per_pass)
    reference = scorer.record.reference
    if standardize and reference is None:
        raise UserError(
            f"{model}: no held-out rows were scored in its training, so there is no mean; leave --standardize out"
        )
    count = 0
    asked = _asked(rows, condition)
    with progress_bar("Scoring", None) as advance:
        while window := list(itertools.islice(asked, WINDOW)):
            flat = [one for _, asked_for, _ in window for one in asked_for]
            scores = iter(scorer.score_requests(flat).tolist())
            if standardize and reference is not None:
                scores = iter([reference.standardized(score) for score in scores])
            for row, asked_for, order in window:
                own = list(itertools.islice(scores, len(asked_for)))
                result: dict[str, Any] = (
                    {"score": own[0]} if order is None else {"scores": [own[place] for place in order]}
                )
                output.write(json.dumps({**row.values, **result}, ensure_ascii=False) + "\n")
            count += len(window)
            advance(len(window))
    return count


def _asked(rows: Rows, condition: str | None) -> Iterator[Asking]:
    reader = Reader(None, PREFERENCES | CONVERSATIONS)
    for row in rows:
        item = reader.read(row.values, row.origin)
        if isinstance(item, Document):
            raise UserError(f"{row.origin}: a text, and conversations are scored; write messages")
        if isinstance(item, Preference):
            conversations = (item.conversation(answer) for answer in range(len(item.answers)))
            name = item.condition or condition
            yield row, [ScoreRequest(one, name, item.prompt) for one in conversations], item.row_order
        else:
            name = row.values.get("condition") or condition
            yield row, [ScoreRequest(item, name, prompt_of(item))], None
