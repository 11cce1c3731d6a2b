"""Files of JSON that every reader can parse: numbers are finite, and a damaged line is no record."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, cast

from tuner.errors import UserError


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({reason}); restore it, or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; restore it, or remove it")
    return cast("dict[str, Any]", value)


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a .jsonl file, and the number of lines that are none; none of either without the file.

    A record is an object with the number of its `step`. Other lines are what a full disk or a power failure left
    behind; a last line without its end, which a kill leaves, is not counted.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); put it right, or move it away"
        ) from error
    records = [record for record in map(_record, lines) if record is not None]
    return records, len(lines) - len(records)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None


def append_line(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, also where the power fails: synced to disk before it gets its name."""
    unfinished = path.with_name(f".writing-{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
