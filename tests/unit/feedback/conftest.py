"""Small sets of candidates, and a store whose clock is set by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuner.feedback.candidates import Candidate, read_candidate
from tuner.feedback.store import LabelStore


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def row(number: int, **values: Any) -> dict[str, Any]:
    answers = [{"text": f"early {number}", "origin": "early"}, {"text": f"late {number}", "origin": "late"}]
    return {"id": f"item{number}", "prompt": f"Question {number}?", "answers": answers, **values}


def candidates(*rows: dict[str, Any]) -> dict[str, Candidate]:
    read = [read_candidate(values, f"candidates.jsonl:{line}") for line, values in enumerate(rows, 1)]
    return {candidate.id: candidate for candidate in read}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[LabelStore]:
    """An open store with item1 to item3."""
    store = LabelStore(tmp_path / "labels.sqlite", clock)
    store.add(candidates(*map(row, (1, 2, 3))).values())
    yield store
    store.close()
