"""Overrides: change leaves of a config, from Python or from the command line."""

import ast
import difflib
import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from tuner.config.base import refuse_unwritable
from tuner.config.serialization import json_value, leaves, validated
from tuner.config.stage_config import StageConfig
from tuner.errors import UserError

C = TypeVar("C", bound=StageConfig)


def override(config: C, changes: Mapping[str, Any] | list[str] | tuple[str, ...]) -> C:
    """A copy of `config` with some leaves changed, validated anew.

    changes: {"optimizer.lr": 1e-4}, or as on the command line ["optimizer.lr=1e-4"].
    Raises UserError for an unknown path or an invalid value.
    """
    pairs = changes if isinstance(changes, Mapping) else dict(_parse_assignment(text) for text in changes)
    values = config.model_dump(mode="json")
    for path, value in pairs.items():
        _refuse_unwritable(path, value)
        _check_first_name(config, path)
        _assign(values, path, value)
    return validated(type(config), values, "override")


def _parse_assignment(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"override {text!r}: write key=value, as in optimizer.lr=1e-4")
    return path, _parse_value(value)


def _parse_value(text: str) -> Any:
    # JSON first, for true and null; Python for tuples, None and single quotes; anything else is a text
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        # TypeError: a list as a key; the last two: too deep, which as a text is refused by its field
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text


def _refuse_unwritable(path: str, value: Any) -> None:
    try:
        refuse_unwritable("override", path)
        refuse_unwritable(f"override {path}", value)
        json.dumps(json_value(value))
    except ValueError as error:
        raise UserError(str(error)) from error
    except TypeError as error:  # a set, bytes, ...
        raise UserError(
            f"override {path}: {value!r:.80} is no value of a config; write a text, a number, true, null, a list or a "
            "mapping"
        ) from error


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    """Set the leaf at a dotted path of a config's plain values; validation rejects an unknown last name."""
    *parents, last = path.split(".")
    container: dict[str, Any] | list[Any] = values
    for depth, name in enumerate(parents, 1):
        child = _child(container, name)
        if not isinstance(child, dict | list):
            parent = ".".join(parents[:depth])
            raise UserError(f"override {path}: {parent} is {child!r}, which has no {last!r}; set it whole")
        container = cast("dict[str, Any] | list[Any]", child)
    if isinstance(container, list):
        _child(container, last)  # raises when there is no such index
        container[int(last)] = json_value(value)
    else:
        container[last] = json_value(value)


def _check_first_name(config: StageConfig, path: str) -> None:
    """Suggest the full path of a field given without it, as in lr=1e-4."""
    first = path.partition(".")[0]
    if first not in type(config).model_fields:
        full_paths = [leaf.path for leaf in leaves(config) if f".{leaf.path}".endswith(f".{path}")]
        if full_paths:
            raise UserError(
                f"override: {type(config).__name__} has no field {path!r}; did you mean {full_paths[0]!r}?"
            )


def _child(values: dict[str, Any] | list[Any], name: str) -> Any:
    try:
        return values[int(name)] if isinstance(values, list) else values[name]
    except (KeyError, IndexError, ValueError):
        names = list(values) if isinstance(values, dict) else [str(index) for index in range(len(values))]
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}"
        raise UserError(f"override: no {name!r} here; {hint}") from None
