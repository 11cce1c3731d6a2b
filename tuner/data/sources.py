"""Rows of files and hub datasets, each with its `file:line`. The one file that imports `datasets`."""

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from tuner.config.data import Source
from tuner.errors import UserError
from tuner.resources import locate

JSON_LINES = (".jsonl", ".ndjson")
PLAIN_TEXT = (".txt", ".md")
HUB_TIMEOUT = 10.0
"""Seconds."""
SUFFIXES = (*JSON_LINES, ".json", ".parquet", *PLAIN_TEXT)


class Row(NamedTuple):
    """One row: its file or hub dataset, its line (or row number) counted from 1, and its values."""

    file: str
    line: int
    values: dict[str, Any]

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.line}"


class Rows:
    """The rows of one source, in order. Every iteration reads the files again.

    Raises UserError when the files are missing, empty, not UTF-8 or broken, or the hub cannot be reached.
    """

    def __init__(self, source: Source):
        self.source = source
        self.files = _find_files(source.path)
        if self.files is not None and (source.subset is not None or source.split != "train"):
            raise UserError(
                f"{source.path}: subset and split choose within a hub dataset, and this is a file; leave them out"
            )
        self._hub = _load_hub(source) if self.files is None else None

    def __iter__(self) -> Iterator[Row]:
        return itertools.islice(self._read(), self.source.limit)

    def identity(self) -> list[list[str]]:
        """[name, hash of the content] of every file, for the cache key."""
        if self.files is None:
            # the hash that `datasets` keeps of a table has no public name
            return [[self.source.path, str(getattr(self._hub, "_fingerprint", ""))]]
        return [[str(file), _hash_file(file)] for file in self.files]

    def _read(self) -> Iterator[Row]:
        if self.files is None:
            yield from _read_dataset(self._hub, f"{self.source.path}/{self.source.split}")
        for file in self.files or ():
            count = 0
            for row in _read_file(file):
                count += 1
                yield row
            if not count:
                raise UserError(
                    f"{file}: the file is empty; put rows in it or take it out of the config's files"
                )


def _find_files(path: str) -> list[Path] | None:
    """The files that match a path or pattern, sorted; None when it names a dataset on the hub."""
    local = str(Path(locate(path)).expanduser())
    if Path(local).is_file():
        return [_check_suffix(Path(local))]
    if glob.has_magic(local):
        files = sorted(Path(file) for file in glob.glob(local, recursive=True) if Path(file).is_file())
        if not files:
            raise UserError(
                f"{path}: no file matches this pattern (seen from {Path.cwd()}); correct the path"
            )
        return [_check_suffix(file) for file in files]
    if Path(local).is_dir():
        raise UserError(f"{path}: this is a folder; name the files in it, as in {path.rstrip('/')}/*.jsonl")
    # a missing `data/train.jsonl` looks like org/name too, and must not be asked of the hub
    if path == local and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and Path(path).suffix not in SUFFIXES:
        return None
    raise UserError(
        f"{path}: no such file (seen from {Path.cwd()}); correct the path, or write org/name for the hub"
    )


def _check_suffix(file: Path) -> Path:
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: files end in {', '.join(SUFFIXES)}; rename or convert this one")
    return file


def _read_file(file: Path) -> Iterator[Row]:
    if file.suffix in JSON_LINES:
        return _read_lines(file)
    if file.suffix == ".parquet":
        return _read_parquet(file)
    text = _decode(file.read_bytes(), file)
    if file.suffix in PLAIN_TEXT:
        return iter([Row(str(file), 1, {"text": text})] if text.strip() else [])
    return _read_list(file, text) if text.lstrip().startswith("[") else _read_lines(file)


def _read_lines(file: Path) -> Iterator[Row]:
    # as bytes: text files decode a buffer ahead, so that bad UTF-8 would be reported at an earlier line
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                # utf-8-sig: json refuses a byte order mark. rstrip: with its line break, a line that breaks
                # off would be reported at column 1 of the next
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
            except UnicodeDecodeError as error:
                raise _not_utf8(file, number, error) from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{file}:{number}: broken JSON at column {error.colno} ({error.msg}); "
                    "every line is one whole JSON object"
                ) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{number}: {_unreadable(error)}") from error
            yield _as_row(file, number, values, b"\\ud" in line.lower())


def _read_list(file: Path, text: str) -> Iterator[Row]:
    """The items of a JSON list, each with the line it begins on."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
    position = text.index("[") + 1
    number = 1 + text.count("\n", 0, position)
    while True:
        separator = blank.match(text, position)
        start = separator.end() if separator else position
        number += text.count("\n", position, start)
        if text[start : start + 1] == "]":
            return
        try:
            values, position = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}:{error.lineno}: broken JSON at column {error.colno} ({error.msg})"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: {_unreadable(error)}") from error
        yield _as_row(file, number, values, "\\ud" in text[start:position].lower())
        number += text.count("\n", start, position)


def _unreadable(error: Exception) -> str:
    reason = "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"
    return f"JSON that cannot be read: {reason}; correct the row"


def _as_row(file: Path, number: int, values: Any, has_surrogates: bool) -> Row:
    """has_surrogates: the JSON escapes some, and must be checked: tokenizers fail on half of a surrogate pair."""
    if not isinstance(values, dict):
        raise UserError(
            f"{file}:{number}: a row is a JSON object, not {type(values).__name__}; write {{...}}"
        )
    row = cast("dict[str, Any]", values)
    if has_surrogates:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            surrogate = error.object[error.start : error.end].encode("unicode_escape").decode()
            raise UserError(
                f"{file}:{number}: {surrogate} is half of a character; write its pair or take it out"
            ) from error
    return Row(str(file), number, row)


def _decode(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, 1 + data.count(b"\n", 0, error.start), error) from error


def _not_utf8(file: Path, number: int, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{file}:{number}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
    )


def _read_parquet(file: Path) -> Iterator[Row]:
    with file.open("rb") as data:
        if data.read(4) != b"PAR1":  # checked here, since `datasets` would log a traceback as well
            raise UserError(f"{file}: this is no Parquet file; write it again, or give it the right suffix")
    try:
        rows = _load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        yield from _read_dataset(rows, str(file))
    except UserError:
        raise
    except Exception as error:  # pyarrow has a dozen classes for a file that is not Parquet
        raise UserError(
            f"{file}: cannot be read as Parquet ({_first_line(error)}); write it again"
        ) from error


def _load_hub(source: Source) -> Any:
    from datasets import config as settings  # pyright: ignore[reportMissingTypeStubs]  # has none

    offline = settings.HF_HUB_OFFLINE
    settings.HF_HUB_OFFLINE = offline or not _hub_answers(source.path)
    try:
        return _load_part(source)
    except Exception as error:  # the hub's clients raise classes of five libraries
        raise UserError(
            f"{source.path}: this dataset could not be loaded from the hub ({_first_line(error)}); "
            "check its name, `subset`, `split` and the network, or give a local file"
        ) from error
    finally:
        settings.HF_HUB_OFFLINE = offline


def _load_part(source: Source) -> Any:
    """A dataset's configuration named `subset`, or else the files of its folder of that name (HH-RLHF)."""
    try:
        return _load_dataset(source.path, source.subset, split=source.split)
    except ValueError as error:
        if source.subset is None or "BuilderConfig" not in str(error):
            raise
        return _load_dataset(source.path, data_dir=source.subset, split=source.split)


def _load_dataset(*arguments: Any, **settings: Any) -> Any:
    import datasets  # pyright: ignore[reportMissingTypeStubs]  # has none

    load = cast("Callable[..., Any]", datasets.load_dataset)  # pyright: ignore[reportUnknownMemberType]
    return load(*arguments, **settings)


def _hub_answers(name: str) -> bool:
    """Whether the hub can be reached. Without a network, `datasets` would retry for half a minute before its cache."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except HfHubHTTPError:  # it answers, and `datasets` explains the error better
        return True
    except Exception:  # the classes of its HTTP library differ by release
        return False
    return True


def _read_dataset(rows: Any, name: str) -> Iterator[Row]:
    for number, values in enumerate(rows, 1):
        yield Row(name, number, values)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _hash_file(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "blake2b").hexdigest()
