"""Damaged rows of every shape and damaged files: each is read, or refused in one sentence with its place."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.test_preference_rows import damaged
from tuner.config.data import Source
from tuner.data.conversation_rows import conversation_reader
from tuner.data.preference_rows import join_answers, preference_reader
from tuner.data.prompt_rows import prompt_reader
from tuner.data.row_shapes import Reader
from tuner.data.sources import Row, Rows
from tuner.data.turns import Cell
from tuner.errors import UserError
from tuner.resources import row_examples_folder

FILES = sorted(row_examples_folder().glob("*.jsonl"))
ROWS = [json.loads(line) for file in FILES for line in file.read_text(encoding="utf-8").splitlines()]


def spelled(row: dict[str, Any]) -> dict[str, Any]:
    """The row as CSV has it."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
    return {key: Cell(text) if text not in ("", "null") else None for key, text in texts.items()}


@pytest.mark.parametrize("make_reader", [conversation_reader, preference_reader, prompt_reader])
def test_damaged_rows_are_read_or_refused_in_a_sentence(make_reader: Callable[[None], Reader]) -> None:
    generator = random.Random(1)
    refusals: list[str] = []
    for _ in range(4000):
        row = generator.choice(ROWS)
        for _ in range(generator.randrange(3)):
            row = damaged(row, generator) if row else row
        if generator.random() < 0.2:
            row = spelled(row)
        reader = make_reader(None)
        try:
            for joined, _ in join_answers([Row("x.jsonl", 7, row)], reader):
                reader.read(joined.values, joined.origin)
        except UserError as error:
            refusals.append(str(error))
    assert all(refusal.startswith("x.jsonl:7: ") and "\n" not in refusal for refusal in refusals)
    assert 500 < len(refusals) < 4000


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_damaged_files_are_read_or_refused_in_a_sentence(tmp_path: Path, suffix: str) -> None:
    generator = random.Random(2)
    file = tmp_path / f"a.{suffix}"
    refusals: list[str] = []
    for _ in range(600):
        rows = generator.sample(ROWS, 3)
        text = json.dumps(rows, indent=generator.choice([None, 1]))
        if suffix == "jsonl":
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
        elif suffix == "csv":
            text = 'a,b,c\n"x\ny",2,3\n4,"5 ""6""",7\n'
        raw = bytearray(text.encode())
        for _ in range(generator.randrange(1, 4)):
            place = generator.randrange(len(raw))
            change = generator.choice([b"", b"\0", b"\xff", b'"', b"\\ud800", b"[", b"}", b",", b"\n", b"\r"])
            raw[place : place + generator.randrange(2)] = change
        file.write_bytes(raw[: generator.choice([len(raw), generator.randrange(1, len(raw))])])
        try:
            list(Rows(Source(path=str(file))))
        except UserError as error:
            refusals.append(str(error))
    assert all(refusal.startswith(str(file)) and "\n" not in refusal for refusal in refusals)
    assert 100 < len(refusals) < 600
