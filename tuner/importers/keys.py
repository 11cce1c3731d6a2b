"""The keys of a foreign config, read by name: a key that nobody reads is reported, never dropped in silence."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from tuner.errors import UserError
from tuner.importers.report import Report
from tuner.printable import half_character


class Block(dict[str, Any]):
    """The keys and values of one level of a config, with the line that each key stands on."""

    def __init__(
        self, values: Mapping[str, Any] | None = None, lines: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(values or {})
        self.lines = dict(lines or {})

    def merge(self, other: Mapping[str, Any], line: int | None = None) -> None:
        """Take over the keys of another block, with their lines (or `line`)."""
        self.update(other)
        lines = other.lines if isinstance(other, Block) else {}
        self.lines.update({key: lines.get(key, line or 0) for key in other})


@dataclass(frozen=True)
class Unread:
    """A value that would have to be computed by running code."""

    source: str
    line: int


class Keys:
    """Reads the keys of a block, each with its type, and remembers which have been read."""

    def __init__(self, block: Block, report: Report, file: str, prefix: str = "") -> None:
        self._block = block
        self._report = report
        self._file = file
        self._prefix = prefix
        self._read: set[str] = set()
        self._parts: list[Keys] = []

    def path(self, key: str) -> str:
        """The key as the report names it: `model.llm.torch_dtype`."""
        return f"{self._prefix}{key}"

    def where(self, key: str) -> str:
        """`file:line` of a key, or the file where its line is unknown."""
        line = self._block.lines.get(key)
        return f"{self._file}:{line}" if line else self._file

    def refuse(self, key: str, message: str) -> NoReturn:
        """Raise UserError for a key's value."""
        raise UserError(f"{self.where(key)}: {self.path(key)}: {message}")

    def has(self, key: str) -> bool:
        """Whether a key has a value."""
        return self._block.get(key) is not None

    def take(self, key: str, default: Any = None) -> Any:
        """A key's value; the default where it is missing or null, or would have to be computed (which is reported)."""
        self._read.add(key)
        value = self._block.get(key)
        if isinstance(value, Unread):
            self.lose(
                key,
                f"{_short(value.source)} would have to be run, and no code of the file is; write the value",
            )
            return default
        if value is None:
            return default
        self._report.carried.add(self.path(key))
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.refuse(key, f"is {_short(value)}, where a text was expected; correct it")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts, also written as one text with commas; empty where the key is missing."""
        value = self.take(key)
        if value is None:
            return []
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            self.refuse(key, f"is {_short(value)}, where a list of texts was expected; correct it")
        return [item.strip() for item in items if item.strip()]

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number; YAML reads 1e-4 as a text, which is accepted."""
        value = self.take(key)
        if value is None:
            return default
        number = as_number(value)
        if number is None:
            self.refuse(key, f"is {_short(value)}, where a number was expected; correct it")
        return number

    def integer(self, key: str, default: int | None = None) -> int | None:
        """A whole number."""
        number = self.number(key)
        if number is None:
            return default
        if number != int(number):
            self.refuse(key, f"is {number:g}, where a whole number was expected; correct it")
        return int(number)

    def boolean(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(key)
        if value is None:
            return default
        written = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(written, bool):
            self.refuse(key, f"is {_short(value)}, where true or false was expected; correct it")
        return written

    def part(self, key: str) -> Keys | None:
        """The keys below a key; None where it is missing."""
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, Block):
            self.refuse(key, f"is {_short(value)}, where a mapping was expected; correct it")
        self._report.carried.discard(self.path(key))
        return self._below(value, f"{self.path(key)}.")

    def parts(self, key: str) -> list[Keys]:
        """The mappings of a list below a key (or the one mapping); empty where it is missing."""
        value = self.take(key)
        items = cast("list[Any]", [value] if isinstance(value, Block) else value or [])
        if not isinstance(items, list | tuple):
            self.refuse(key, f"is {_short(value)}, where a list of mappings was expected; correct it")
        self._report.carried.discard(self.path(key))
        blocks: list[Keys] = []
        for index, item in enumerate(items):
            if isinstance(item, Unread) or not isinstance(item, Block):
                self._report.lose(f"{self.path(key)}.{index}", f"{_short(item)} is no mapping of literals")
            else:
                blocks.append(self._below(item, f"{self.path(key)}.{index}."))
        return blocks

    def lose(self, key: str, why: str) -> None:
        """Report a key that cannot be carried."""
        self._read.add(key)
        self._report.lose(self.path(key), why)

    def ignore(self, key: str, why: str) -> None:
        """Report a key that needs no counterpart."""
        self._read.add(key)
        self._report.ignore(self.path(key), why)

    def finish(self, lost: Mapping[str, str], idle: Mapping[str, str]) -> None:
        """Report every key that has not been read, in the parts too; null and `false` set nothing.

        lost, idle: key, or its beginning with *, -> why; a key of neither is one that tuner does not know.
        """
        for key in [key for key in self._block if key not in self._read]:
            value = self._block[key]
            if value is None or value is False or value in ("", [], {}):
                continue
            known, needless = _entry(lost, key), _entry(idle, key)
            if known is None and needless is not None:
                self.ignore(key, idle[needless])
            else:
                self.lose(key, lost[known] if known else f"{_short(value)}: tuner does not know this key")
        for part in self._parts:
            part.finish(lost, idle)

    def _below(self, block: Block, prefix: str) -> Keys:
        keys = Keys(block, self._report, self._file, prefix)
        self._parts.append(keys)
        return keys


def is_text(value: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a character (lone surrogate)."""
    return half_character(value) is None


def as_number(value: Any) -> float | None:
    """A number, or a text that spells one; None for anything else, and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 2**63 else None


def _entry(table: Mapping[str, str], key: str) -> str | None:
    """The name in a table that a key falls under: itself, or the longest beginning of it that ends in *."""
    if key in table:
        return key
    begins = [name for name in table if name.endswith("*") and key.startswith(name[:-1])]
    return max(begins, key=len, default=None)


def _short(value: Any) -> str:
    if isinstance(value, Unread):
        value = value.source
    return (
        reprlib.repr(value)
        if not isinstance(value, str)
        else repr(value if len(value) < 60 else value[:57] + "...")
    )
