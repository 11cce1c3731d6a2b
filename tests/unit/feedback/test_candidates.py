"""Rows as candidates, and their errors by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.feedback.conftest import row
from tuner.errors import UserError
from tuner.feedback.candidates import read_candidate, read_candidates


def test_a_row_by_hand() -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2?"},
    ]
    values = row(
        1, prompt=turns, system="Be kind.", condition="brief", guideline="Shorter.", gold=1, weight=2
    )
    candidate = read_candidate(values, "rows.jsonl:1")
    assert [turn.role for turn in candidate.prompt] == ["system", "user", "assistant", "user"]
    assert candidate.answers == ("early 1", "late 1")
    assert candidate.origins == ("early", "late")
    assert (candidate.condition, candidate.guideline, candidate.gold) == ("brief", "Shorter.", "second")
    assert candidate.preference(1, 0.5) == {
        "id": "item1",
        "prompt": turns,
        "system": "Be kind.",
        "condition": "brief",
        "chosen": "late 1",
        "rejected": "early 1",
        "weight": 1.0,
    }


def test_rows_without_an_id_are_named_by_what_is_judged() -> None:
    values = {"prompt": "2?", "answers": ["two", "three"]}
    plain = read_candidate(values, "rows.jsonl:1")
    assert plain.id == read_candidate({**values, "guideline": "new words"}, "rows.jsonl:9").id
    assert plain.id != read_candidate({**values, "condition": "brief"}, "rows.jsonl:1").id
    assert plain.origins == (None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"answers": ["a", "b"]}, 'has "prompt" and "answers"'),
        ({"prompt": "x"}, 'has "prompt" and "answers"'),
        ({"prompt": " ", "answers": ["a", "b"]}, "the prompt is empty"),
        (row(1, answers=["a"]), "1 entries"),
        (row(1, answers=["a", "a"]), "same text"),
        (row(1, answers=["a", {"origin": "late"}]), '"text" of an answer is missing'),
        (row(1, gold=2), '"gold" is 0 or 1'),
        (row(1, gold=True), '"gold" is 0 or 1'),
        (row(1, gold=[0]), '"gold" is 0 or 1'),
        (row(1, id=1.5), '"id" is a text or a whole number'),
        (row(1, condition=3), '"condition" is the name'),
        (row(1, guideline=3), '"guideline" is not a text'),
        (row(1, scores=[0.1, 0.2]), '"scores" is a list of two numbers for each'),
        (row(1, scores=[[0.1, "x"]]), '"scores" is a list of two numbers for each'),
        (row(1, weight=-1), '"weight" is a number'),
    ],
)
def test_rows_that_are_no_candidates(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:7: ") as error:
        read_candidate(values, "rows.jsonl:7")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no candidates"),
        (json.dumps(row(1)) + "\n" + json.dumps(row(1)), r":2: id 'item1' is also that of .*:1"),
        ("{", "broken JSON"),
    ],
)
def test_files_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_candidates(file)
    with pytest.raises(UserError, match="no such file"):
        read_candidates(tmp_path / "none.jsonl")
    file.rename(tmp_path / "rows.csv")
    with pytest.raises(UserError, match=r"read from \.jsonl"):
        read_candidates(tmp_path / "rows.csv")
