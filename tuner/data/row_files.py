"""Rows of text files, each with the line it begins on: JSON in every form, CSV, plain text; plain or compressed."""

import csv
import gzip
import importlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from tuner.data.turns import DEEPEST, Cell, is_nested_too_deeply, is_object
from tuner.errors import UserError
from tuner.printable import half_character

JSON_LINES = (".jsonl", ".ndjson")
PLAIN_TEXT = (".txt", ".md")
TEXT_SUFFIXES = (*JSON_LINES, ".json", ".csv", *PLAIN_TEXT)
COMPRESSED = (".gz", ".zst")
"""Suffixes behind one of TEXT_SUFFIXES. What a file is compressed with is told by its first bytes."""
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROW_KEYS = ("data", "rows", "instances", "examples")
"""Keys of the rows in a file that is one JSON object."""


class Row(NamedTuple):
    """One row: its file or hub dataset, its line (or row number) counted from 1, and its values."""

    file: str
    line: int
    values: dict[str, Any]

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.line}"


def format_suffix(file: Path) -> str:
    """The suffix that tells a file's format: of a compressed one, that before `.gz` or `.zst`."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def read_text_file(file: Path) -> Iterator[Row]:
    """The rows of a file with one of TEXT_SUFFIXES. Raises UserError with `file:line` where it is broken or torn."""
    suffix = format_suffix(file)
    if suffix in JSON_LINES:
        return _read_json_lines(file)
    if suffix == ".csv":
        return _read_csv(file)
    text = "".join(text for _, text in _text_lines(file))
    if suffix in PLAIN_TEXT:
        return iter([Row(str(file), 1, {"text": text})] if text.strip() else [])
    return _read_json(file, text)


def _open(file: Path) -> IO[bytes]:
    with file.open("rb") as stream:
        magic = stream.read(len(_ZSTD))
    if magic.startswith(_GZIP):
        return cast("IO[bytes]", gzip.open(file))
    if magic == _ZSTD:
        pyarrow: Any = importlib.import_module("pyarrow")
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of every line, without the byte order mark."""
    number = 0
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, 1):
                if b"\0" in line:
                    raise UserError(
                        f"{file}:{number}: NUL bytes, as in binary data, UTF-16, or a file that was not written to its "
                        "end; save it as UTF-8 text"
                    )
                yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
    except (OSError, EOFError, zlib.error, ValueError) as error:  # of the file, or of its compression
        raise UserError(
            f"{file}:{number + 1}: the file cannot be read further ({error}); write it again"
        ) from error


def _text_lines(file: Path) -> Iterator[tuple[int, str]]:
    # line by line: text files decode a buffer ahead, so that bad UTF-8 would be reported at an earlier line
    for number, line in _lines(file):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}:{number}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
            ) from error
        yield number, text


# JSON


def _read_json_lines(file: Path) -> Iterator[Row]:
    """A value a line; from a first line that holds only the beginning of a value on, values over several lines."""
    lines = _text_lines(file)
    is_first = True
    for number, line in lines:
        if not line.strip():
            continue
        if is_first and (line.strip() == "{" or line.lstrip().startswith("[")):
            yield from _read_json(file, line + "".join(text for _, text in lines), number)
            return
        is_first = False
        # rstrip: with its line break, a line that breaks off would be reported at column 1 of the next
        values = _Values(file, line.rstrip(), number, "; every line is one whole JSON object")
        yield from values.rows()


def _read_json(file: Path, text: str, first_line: int = 1) -> Iterator[Row]:
    """The rows of values one after another, or of the one list of rows in an only object, as in {"data": [...]}."""
    if (key := _row_key(text)) is None:
        return _Values(file, text, first_line).rows()
    return _Values(file, text, first_line).rows_under(key)


def _row_key(text: str) -> str | None:
    """The key of the rows in a text that is one JSON object; None where it is anything else."""
    if not text.lstrip().startswith("{"):
        return None
    start = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):  # reported where its rows are read
        return None
    keys = [key for key in _ROW_KEYS if isinstance(value.get(key), list) and all(map(is_object, value[key]))]
    return keys[0] if len(keys) == 1 and not text[end:].strip() else None


class _Values:
    """The JSON values of a text one after another, with their lines: objects are rows, lists hold rows."""

    def __init__(self, file: Path, text: str, first_line: int, remedy: str = ""):
        self._file, self._text, self._remedy = file, text, remedy
        self._first_line = self._line = first_line
        self._position = 0

    def rows(self) -> Iterator[Row]:
        """All rows from here on."""
        while character := self._next_character():
            if character == "[":
                yield from self._items()
            else:
                yield self._row()

    def rows_under(self, key: str) -> Iterator[Row]:
        """The rows in the list under a key of the object that begins here."""
        self._next_character()
        self._position += 1  # the brace
        while self._value() != key:
            self._value()
        self._next_character()
        yield from self._items()

    def _items(self) -> Iterator[Row]:
        self._position += 1  # the bracket
        while self._next_character() != "]":
            yield self._row()
        self._position += 1

    def _next_character(self) -> str:
        """The first character behind white space and separators, where the next value begins; "" at the end."""
        separator = _SEPARATOR.match(self._text, self._position)
        start = separator.end() if separator else self._position
        self._line += self._text.count("\n", self._position, start)
        self._position = start
        return self._text[start : start + 1]

    def _value(self) -> Any:
        """The value that begins here."""
        self._next_character()
        start = self._position
        try:
            value, self._position = _DECODER.raw_decode(self._text, start)
        except json.JSONDecodeError as error:
            line = self._first_line + error.lineno - 1
            raise UserError(
                f"{self._file}:{line}: broken JSON at column {error.colno} ({error.msg}){self._remedy}"
            ) from error
        except (ValueError, RecursionError) as error:
            reason = _TOO_DEEP if isinstance(error, RecursionError) else "a number of thousands of digits"
            raise self._unreadable(reason) from error
        self._line += self._text.count("\n", start, self._position)
        return value

    def _row(self) -> Row:
        self._next_character()
        start, line = self._position, self._line
        values = self._value()
        if not is_object(values):
            raise UserError(
                f"{self._file}:{line}: a row is a JSON object, not {type(values).__name__}; write {{...}}"
            )
        self._line, end_line = line, self._line  # for errors
        brackets = sum(self._text.count(bracket, start, self._position) for bracket in "[{")
        if brackets > DEEPEST and is_nested_too_deeply(values):
            raise self._unreadable(_TOO_DEEP)
        # only escapes can stand for half of a surrogate pair, on which tokenizers fail
        if "\\ud" in self._text[start : self._position].lower():
            self._refuse_surrogates(values)
        self._line = end_line
        return Row(str(self._file), line, cast("dict[str, Any]", values))

    def _refuse_surrogates(self, values: Any) -> None:
        if (half := half_character(json.dumps(values, ensure_ascii=False))) is not None:
            raise UserError(
                f"{self._file}:{self._line}: {half} is half of a character; write its pair or take it out"
            )

    def _unreadable(self, reason: str) -> UserError:
        return UserError(f"{self._file}:{self._line}: JSON that cannot be read: {reason}; correct the row")


_DECODER = json.JSONDecoder()
_SEPARATOR = re.compile(r"[\s,:]*")
_TOO_DEEP = "nested too deeply"


# CSV


def _read_csv(file: Path) -> Iterator[Row]:
    """Comma-separated cells under a header; an empty cell is an absent value."""
    csv.field_size_limit(sys.maxsize)  # csv's own limit is 128 KiB
    reader = csv.reader((line for _, line in _text_lines(file)), strict=True)
    header: list[str] | None = None
    number = 1
    try:
        for cells in reader:
            if header is None:
                header = cells
                if repeated := {name for name in cells if cells.count(name) > 1}:
                    raise UserError(f"{file}:1: two columns are named {min(repeated)!r}; rename one")
            elif cells:
                if len(cells) != len(header):
                    raise UserError(
                        f"{file}:{number}: {len(cells)} cells, and the header has {len(header)}; put quotation marks "
                        "around cells with commas or line breaks"
                    )
                values = {
                    name: Cell(cell) if cell else None for name, cell in zip(header, cells, strict=True)
                }
                yield Row(str(file), number, values)
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}:{number}: broken CSV ({error}); correct the row") from error
