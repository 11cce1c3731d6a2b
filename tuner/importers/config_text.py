"""A config in the making as the text of a Python file, formatted as ruff formats it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from tuner.importers.part import Function, Part
from tuner.printable import printable

WIDTH = 110
"""Columns of a line."""


def config_text(config: Part, docstring: str, functions: Iterable[str] = ()) -> str:
    """A config file: its docstring, the imports, the functions that the config names, the config."""
    definitions = "".join(f"\n\n{function.strip()}\n" for function in functions)
    space = "\n\n" if definitions else "\n"
    source = _source(config, 0, len("config = "))
    return f'"""{_docstring(docstring)}"""\n\n{_imports(config)}\n{definitions}{space}config = {source}\n'


def python_number(value: float) -> str:
    """A number as this repository's configs write it: 2e-4, 32_768, 0.95."""
    if value == int(value):
        return f"{int(value):_}"
    mantissa, e, exponent = f"{value:.12e}".partition("e")
    short = f"{mantissa.rstrip('0').rstrip('.')}{e}{int(exponent)}"
    tiny = 0 < abs(value) < 1e-2 and float(short) == value and len(short) <= len(repr(value))
    return short if tiny else repr(value)


def python_text(text: str) -> str:
    """A text as ruff quotes it: by double quotes, unless it holds them and no single ones."""
    quoted = repr(text)
    if quoted[0] == '"' or '"' in text:
        return quoted
    return f'"{quoted[1:-1]}"'


def _docstring(text: str) -> str:
    return printable(text).replace("\\", "/").replace('"', "'")


def _imports(config: Part) -> str:
    # as isort orders them: constants, then classes
    names = sorted(set(config.class_names()), key=lambda name: (not name.isupper(), name))
    line = f"from tuner.config import {', '.join(names)}"
    if len(line) <= WIDTH:
        return line
    return "from tuner.config import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _source(value: Any, indent: int, before: int) -> str:
    """The source of a value that starts at column `before` of a line indented by `indent` spaces."""
    if not _has_comments(value):
        line = _line(value)
        # one more column for the comma or bracket behind
        if before + len(line) < WIDTH or not isinstance(value, Part | tuple | dict):
            return line
    inner, pad = indent + 4, " " * (indent + 4)
    if isinstance(value, Part):
        items = [
            f"{_comment(value.comments.get(name), inner)}{pad}{name}={_source(item, inner, inner + len(name) + 1)},\n"
            for name, item in value.fields.items()
        ]
        return f"{value.name}(\n{''.join(items)}{' ' * indent})"
    if isinstance(value, dict):
        items = [
            f"{pad}{_line(key)}: {_source(item, inner, inner + len(_line(key)) + 2)},\n"
            for key, item in value.items()
        ]
        return f"{{\n{''.join(items)}{' ' * indent}}}"
    items = [
        f"{_comment(getattr(item, 'comment', None), inner)}{pad}{_source(item, inner, inner)},\n"
        for item in value
    ]
    return f"(\n{''.join(items)}{' ' * indent})"


def _line(value: Any) -> str:
    if isinstance(value, Part):
        return f"{value.name}({', '.join(f'{name}={_line(item)}' for name, item in value.fields.items())})"
    if isinstance(value, tuple):
        return f"({', '.join(_line(item) for item in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_line(key)}: {_line(item)}' for key, item in value.items())}}}"
    if isinstance(value, Function):
        return str(value)
    if value is ...:
        return "None"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return python_number(value)
    return python_text(value) if isinstance(value, str) else repr(value)


def _has_comments(value: Any) -> bool:
    if isinstance(value, Part):
        return bool(value.comments) or any(_has_comments(item) for item in value.fields.values())
    if isinstance(value, tuple):
        return any(_has_comments(item) or getattr(item, "comment", None) for item in value)
    return False


def _comment(text: str | None, indent: int) -> str:
    if not text:
        return ""
    pad = " " * indent
    words = " ".join(printable(text).split())
    lines = textwrap.wrap(words, WIDTH - indent - 2, break_long_words=False, break_on_hyphens=False)
    return "".join(f"{pad}# {line}\n" for line in lines)
