"""Scores for a file of rows, a window of rows at a time, so that files of any size fit into memory."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from tuner.config import Source
from tuner.data.answers import read_condition, read_reference
from tuner.data.conversation import Document, Preference
from tuner.data.conversation_rows import SHAPES as CONVERSATIONS
from tuner.data.preference_rows import SHAPES as PREFERENCES
from tuner.data.row_shapes import Reader
from tuner.data.sources import Row, Rows
from tuner.display.progress import progress_bar
from tuner.errors import UserError
from tuner.models.load import Precision
from tuner.models.reward_record import unasked
from tuner.models.scorer import ScoreRequest, open_scorer, prompt_of
from tuner.printable import echo, printable_json
from tuner.stages.run_models import usable_path

WINDOW = 2048
"""Rows read and scored together; many, so that passes are full."""


@dataclass(frozen=True)
class RowRequests:
    """A row, and the conversations to score for it."""

    row: Row
    requests: Sequence[ScoreRequest]
    order: Sequence[int] | None
    """Index of the request for each answer, in the order of the row; None for a row of one conversation."""

    def result(self, scores: Sequence[float]) -> dict[str, Any]:
        """The fields to add to the row. scores: one for each request."""
        if self.order is None:
            return {"score": scores[0]}
        return {"scores": [scores[index] for index in self.order]}


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
    trust: bool = False,
) -> int:
    """Write each row with its "score", or with the "scores" of its answers in their order; returns the number of rows.

    condition: for rows that name none. standardize: scores in standard deviations from the mean of the held-out scores.
    trust: let the model run Python code of its own.
    Raises UserError with `file:line` for bad rows, and where there is no such mean.
    """
    rows = Rows(Source(path=file))
    scorer = open_scorer(
        usable_path(model, trust=trust),
        precision=precision,
        template=template,
        tokens_per_pass=tokens_per_pass,
        trust=trust,
    )
    reference = scorer.record.reference
    if standardize and reference is None:
        raise UserError(
            f"{model}: no held-out rows were scored in its training, so there is no mean; leave --standardize out"
        )
    count = unconditioned = 0
    row_requests = _row_requests(rows, condition, scorer.template.needs_reference)
    with progress_bar("Scoring", None) as advance:
        # Not row by row: a pass would hold one conversation. Not the whole file: it may not fit into memory.
        while window := list(itertools.islice(row_requests, WINDOW)):
            unconditioned += sum(item.requests[0].condition is None for item in window)
            scores = iter(scorer.score_requests([request for item in window for request in item.requests]))
            for item in window:
                row_scores = [float(score) for score in itertools.islice(scores, len(item.requests))]
                if standardize and reference is not None:
                    row_scores = [reference.standardized(score) for score in row_scores]
                values = {**item.row.values, **item.result(row_scores)}
                # default: cells of a table, such as dates
                output.write(printable_json(values, default=str) + "\n")
            count += len(window)
            advance(len(window))
    for sentence in unasked(list(scorer.record.conditions), unconditioned, "add --condition NAME"):
        echo(f"tuner: {sentence}", sys.stderr)
    return count


def _row_requests(rows: Rows, condition: str | None, with_reference: bool) -> Iterator[RowRequests]:
    # a row of one answer is scored by itself
    preferences = {name: shape for name, shape in PREFERENCES.items() if not shape.joined}
    reader = Reader(None, {**preferences, **CONVERSATIONS})
    for row in rows:
        item = reader.read(row.values, row.origin)
        if isinstance(item, Document):
            raise UserError(f"{row.origin}: a text, and conversations are scored; write messages")
        if with_reference:
            item = item.with_reference(read_reference(row.values, row.origin))
        if isinstance(item, Preference):
            conversations = (item.conversation(answer) for answer in range(len(item.answers)))
            name = item.condition or condition
            requests = [ScoreRequest(conversation, name, item.prompt) for conversation in conversations]
            yield RowRequests(row, requests, item.row_order)
        else:
            name = read_condition(row.values, row.origin) or condition
            yield RowRequests(row, [ScoreRequest(item, name, prompt_of(item))], None)
