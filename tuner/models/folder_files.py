"""The only reader of the JSON files of model folders: a value of the file's type, or a UserError."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tuner.config.validation_errors import explain
from tuner.errors import UserError

T = TypeVar("T")

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""How a dataclass is read that has it as `__pydantic_config__`: no text for a number, no unknown field, no NaN."""


def read_file(file: Path, kind: type[T], advice: str = "restore it or train again") -> T:
    """The content of a JSON file as a value of a class: a pydantic model, or a dataclass (see STRICT).

    Raises UserError, naming file and field, where the file cannot be read or a field has no sensible value.
    """
    try:
        return _reader(kind).validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":  # explained, it would show the whole file
            raise UserError(f"{file}: cannot be read ({first['msg']}); {advice}") from error
        raise UserError(f"{file}: {explain(error, kind, in_json=True)}; {advice}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {advice}") from error


def read_object(file: Path, advice: str = "restore it") -> dict[str, Any]:
    """The object in a JSON file, its fields as they are. Raises UserError where there is none."""
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{file}: cannot be read ({error}); {advice}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds no JSON object; {advice}")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from: others, such as an adapter's, may lie beside them.

    Raises UserError where one is missing.
    """
    if (single := folder / "model.safetensors").is_file():
        return [single]
    weight_map = read_object(folder / f"{single.name}.index.json").get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    missing = [name for name in names if not (folder / name).is_file()]
    if not names or missing:
        raise UserError(
            f"{folder}: {', '.join(missing) or 'a list of its files'} is missing; restore the weights"
        )
    return [folder / name for name in names]


def first_line(error: BaseException) -> str:
    """First line of a library's error, with the second where it announces that; the rest is advice for programmers."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # some say no more than a key or a value
    return (text if " " in text else f"{type(error).__name__}: {text}").rstrip(".: ")


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
