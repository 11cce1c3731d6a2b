"""The functions that a config names, and fingerprints of their code: a run goes on only with the same functions."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tuner.config.base import ConfigBase
from tuner.config.functions import is_function_reference
from tuner.config.serialization import validated
from tuner.config.stage_config import StageConfig
from tuner.errors import UserError

C = TypeVar("C", bound=StageConfig)


def functions_of(config: ConfigBase) -> list[str]:
    """The `file.py:name` references in a config, or in a part of it, each once."""
    return list(dict.fromkeys(_references(config.model_dump(mode="json"))))


def replace_functions(config: C, replacements: Mapping[str, str]) -> C:
    """The config with other `file.py:name` references, wherever it has those that are replaced."""
    return validated(type(config), _replace(config.model_dump(mode="json"), replacements), "config")


def code_fingerprints(config: ConfigBase) -> dict[Path, str]:
    """File -> fingerprint of its code, for the files that hold the config's functions and are there."""
    files = sorted({Path(reference.rpartition(":")[0]) for reference in functions_of(config)})
    return {file: _code_fingerprint(file) for file in files if file.is_file()}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif is_function_reference(value):
        yield value


def _replace(value: Any, replacements: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replace(item, replacements) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, replacements) for item in value]
    return replacements.get(value, value) if isinstance(value, str) else value


def _code_fingerprint(file: Path) -> str:
    """SHA-256 of a file's syntax tree: comments and layout do not count.

    Nor does a `config` that the file assigns: configs are compared field by field. Raises UserError for bad syntax.
    """
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file}: {type(error).__name__}: {error}; correct this file") from error
    tree.body = [statement for statement in tree.body if not _assigns_config(statement)]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def _assigns_config(statement: ast.stmt) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == "config" for target in targets)
