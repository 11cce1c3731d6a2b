"""Overrides: a config with some leaves changed, from Python or from the command line."""

import ast
import difflib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from tuner.config.serialization import leaves, validated
from tuner.config.stage_config import StageConfig
from tuner.errors import UserError

C = TypeVar("C", bound=StageConfig)


def override(config: C, changes: Mapping[str, Any] | list[str] | tuple[str, ...]) -> C:
    """A copy of `config` with some leaves changed, checked as a whole again.

    changes: {"optimizer.lr": 1e-4}, or what the command line takes: ["optimizer.lr=1e-4"].
    """
    pairs = changes if isinstance(changes, Mapping) else dict(_parse_assignment(text) for text in changes)
    values = config.model_dump(mode="json")
    for path, value in pairs.items():
        _check_first_name(config, path)
        _assign(values, path, value)
    return validated(type(config), values, "override")


def _parse_assignment(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"override {text!r}: write key=value, as in optimizer.lr=1e-4")
    return path, _parse_value(value)


def _parse_value(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _assign(values: Any, path: str, value: Any) -> None:
    """Set the leaf at a dotted path of the plain values of a config; names are checked by the validation."""
    *parents, last = path.split(".")
    walked: list[str] = []
    for name in parents:
        walked.append(name)
        values = _child(values, name)
        if not isinstance(values, dict | list):
            raise UserError(
                f"override {path}: {'.'.join(walked)} is {values!r}, which has no {last!r}; set it whole"
            )
    if isinstance(values, list):
        _child(values, last)  # an index must exist
        values[int(last)] = _plain(value)
    else:
        values[last] = _plain(value)


def _check_first_name(config: StageConfig, path: str) -> None:
    """Say where a field stands that is named without its part, as in lr=1e-4."""
    first = path.partition(".")[0]
    if first not in type(config).model_fields:
        inside = [leaf.path for leaf in leaves(config) if f".{leaf.path}".endswith(f".{path}")]
        if inside:
            raise UserError(
                f"override: {type(config).__name__} has no field {path!r}; did you mean {inside[0]!r}?"
            )


def _child(values: Any, name: str) -> Any:
    try:
        return values[int(name)] if isinstance(values, list) else values[name]
    except (KeyError, IndexError, ValueError):
        known = values if isinstance(values, dict) else [str(index) for index in range(len(values))]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        raise UserError(f"override: no {name!r} here; {hint}") from None


def _plain(value: Any) -> Any:
    """A value as JSON has it; parts may stand in a tuple, as sources do in data.files."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
