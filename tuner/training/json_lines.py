"""Files of JSON that every reader can parse: numbers are finite, and a half-written line is no record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """The value with None in place of NaN and infinities, at any depth: JSON has no words for them."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json_line(record: dict[str, Any]) -> str:
    """The record as one line of a .jsonl file."""
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file without a last line that a kill left half-written; empty without the file."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines[:-1]]  # not splitlines: texts hold other line separators


def append_line(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".writing-{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
