"""The user's own modules that a Python file imports, found without running any of them."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
_INSTALLED = {"site-packages", "dist-packages"}
_TUNER = Path(__file__).resolve().parents[1]


def imported_files(file: Path, code: ast.Module | None = None) -> list[Path]:
    """The files of the modules that a file imports, directly or through another of them, in order.

    code: the part of the file that counts; None: all of it. Modules of Python, of installed packages and of tuner are
    left out. Modules are searched beside the file first, as for a config file, then where Python would; names that a
    program computes are not seen. A file that is not valid Python imports nothing: whoever runs it says what is wrong.
    """
    file = file.resolve()
    reached, waiting = {file}, [(file, code or _parsed(file))]
    while waiting:
        for imported in _imports(*waiting.pop(), file.parent):
            if imported not in reached:
                reached.add(imported)
                waiting.append((imported, _parsed(imported)))
    return sorted(reached - {file})


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _imports(file: Path, code: ast.Module, folder: Path) -> Iterator[Path]:
    """Files of the modules that a file's own import statements name. folder: where to search first."""
    for statement in ast.walk(code):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield from _files_of(alias.name.split("."), [str(folder), *sys.path])
        elif isinstance(statement, ast.ImportFrom):
            path = [str(folder), *sys.path]
            if statement.level:  # from . or .. of a package
                path = [str(file.parents[statement.level - 1])]
            parts = statement.module.split(".") if statement.module else []
            for alias in statement.names:  # each may be a module, or a name in one
                yield from _files_of([*parts, alias.name], path)


def _files_of(parts: list[str], path: list[str]) -> Iterator[Path]:
    """Files of a package and of the modules within it that dotted parts name, as far as they are modules."""
    for part in parts:
        specification = PathFinder.find_spec(part, path)
        if specification is None:
            return
        if specification.has_location and specification.origin:
            source = Path(specification.origin).resolve()
            if not _is_users(source):
                return
            yield source
        path = list(specification.submodule_search_locations or [])


def _is_users(source: Path) -> bool:
    is_others = any(source.is_relative_to(folder) for folder in (_TUNER, _STANDARD_LIBRARY))
    return source.suffix == ".py" and source.is_file() and not is_others and not _INSTALLED & {*source.parts}
