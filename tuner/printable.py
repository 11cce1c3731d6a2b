"""The ways out to a terminal or a page: whatever rows, models and names hold is shown there and commands nothing."""

import json
import sys
import unicodedata
from collections.abc import Callable
from html import escape
from typing import Any, TextIO


def printable(text: str) -> str:
    """The text with control and direction characters and lone surrogates escaped; spaces of every width stay."""
    if text.isprintable():  # nearly always
        return text
    return "".join(
        character if character in "\n\t" or _is_harmless(character) else repr(character)[1:-1]
        for character in text
    )


def half_character(text: str) -> str | None:
    """The first half of a character (lone surrogate) in a text, escaped; None where it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start].encode("unicode_escape").decode()
    return None


def safe(text: str) -> str:
    """Text that is nothing but text in a page of HTML, whatever it contains."""
    return escape(printable(text))


def printable_json(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """JSON of the same value in which what `printable` would escape has JSON's own escapes.

    default: what to write of a value that JSON has no form of, as a cell of a table; None: TypeError.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=default)
    if text.isprintable():
        return text
    return "".join(
        character if character == "\n" or _is_harmless(character) else json.dumps(character)[1:-1]
        for character in text
    )


def echo(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print a printable text at once. stream: stdout by default."""
    print(printable(text), file=stream or sys.stdout, end=end, flush=True)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"
