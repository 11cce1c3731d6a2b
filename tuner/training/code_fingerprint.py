"""The functions that a config names, and fingerprints of their code: a run goes on only with the same functions."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tuner.config.base import ConfigBase
from tuner.config.functions import is_function_reference
from tuner.config.imported_files import imported_files
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
    """File -> fingerprint of its code, for the files that hold the config's functions and are there.

    Behind them the user's modules that these import: a function is as much what it calls.
    """
    named = sorted({Path(reference.rpartition(":")[0]) for reference in functions_of(config)})
    files = [file for file in named if file.is_file()]
    known = {file.resolve() for file in files}
    imported = {module for file in files for module in imported_files(file, _code(file))} - known
    return {file: _code_fingerprint(file) for file in (*files, *sorted(imported))}


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
    """SHA-256 of a file's syntax tree without a `config` that it assigns: comments and layout do not count."""
    tree = _parsed(file)
    tree.body = [statement for statement in tree.body if not _assigns_config(statement)]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def _code(file: Path) -> ast.Module:
    """A file without a `config` that it assigns, and what it imports for that alone, such as a config to build on.

    Configs are compared field by field.
    """
    tree = _parsed(file)
    configs = [statement for statement in tree.body if _assigns_config(statement)]
    tree.body = [statement for statement in tree.body if statement not in configs]
    of_configs = _names(configs) - _names(tree.body)
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            statement.names = [
                alias
                for alias in statement.names
                if (alias.asname or alias.name.partition(".")[0]) not in of_configs
            ]
    return tree


def _parsed(file: Path) -> ast.Module:
    """Raises UserError for bad syntax."""
    try:
        return ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file}: {type(error).__name__}: {error}; correct this file") from error


def _names(statements: Sequence[ast.stmt]) -> set[str]:
    """The variables that some statements read or assign."""
    nodes = (node for statement in statements for node in ast.walk(statement))
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def _assigns_config(statement: ast.stmt) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == "config" for target in targets)
