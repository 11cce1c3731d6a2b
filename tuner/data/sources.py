"""Rows of files, folders and hub datasets, each with its `file:line`. The one file that imports `datasets`."""

import glob
import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from tuner.config.data import Source
from tuner.data.row_files import COMPRESSED, TEXT_SUFFIXES, Row, format_suffix, read_text_file
from tuner.errors import MissingError, UserError
from tuner.resources import locate

HUB_TIMEOUT = 10.0
"""Seconds."""
_TABLES = {".parquet": "Parquet", ".arrow": "Arrow"}
"""Suffix -> format of files in columns."""
SUFFIXES = (*TEXT_SUFFIXES, *_TABLES)
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
"""The file that a folder of `save_to_disk` has: of one dataset, and of several splits."""


class Rows:
    """The rows of one source, in order. Every iteration reads the files again.

    Raises UserError when the files are missing, empty, not UTF-8 or broken, or the hub cannot be reached.
    """

    def __init__(self, source: Source):
        self.source = source
        self._saved = _find_saved(source)
        self.files = _saved_files(self._saved) if self._saved else _find_files(source.path)
        no_such_split = source.split != "train" and (self._saved is None or self._saved.name != source.split)
        if self.files is not None and (source.subset is not None or no_such_split):
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
            return
        for path in [self._saved] if self._saved else self.files:
            count = 0
            for row in _read_saved(path) if path.is_dir() else _read_file(path):
                count += 1
                yield row
            if not count:
                raise UserError(
                    f"{path}: the file is empty; put rows in it or take it out of the config's files"
                )


def refuse_missing_files(source: Source) -> None:
    """Raise UserError where a source's files are not here and its path cannot be a name on the hub."""
    if _find_saved(source) is None:
        _find_files(source.path)


def _find_saved(source: Source) -> Path | None:
    """The folder of a dataset that `save_to_disk` wrote, or of the source's split in it; None when it is no such one.

    A split is named by the source where the folder has several, as for a hub dataset.
    """
    folder = Path(locate(source.path)).expanduser()
    if not (folder / _SAVED_SPLITS).is_file():
        return folder if (folder / _SAVED).is_file() else None
    if not (folder / source.split / _SAVED).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{_SAVED}"))
        raise UserError(
            f"{source.path}: no split {source.split!r} in this folder; set the source's split to one of "
            f"{', '.join(splits)}"
        )
    return folder / source.split


def _saved_files(folder: Path) -> list[Path]:
    """The files that hold the rows of a saved dataset, and those that describe them."""
    return sorted([*folder.glob("*.json"), *folder.glob("data-*.arrow")])


def _find_files(path: str) -> list[Path] | None:
    """The files that match a path or pattern, sorted; None when it names a dataset on the hub."""
    local = str(Path(locate(path)).expanduser())
    if Path(local).is_file():
        return [_check_suffix(Path(local))]
    if glob.has_magic(local):
        files = sorted(Path(file) for file in glob.glob(local, recursive=True) if Path(file).is_file())
        if not files:
            raise MissingError(
                f"{path}: no file matches this pattern (seen from {Path.cwd()}); correct the path"
            )
        return [_check_suffix(file) for file in files]
    if Path(local).is_dir():
        raise UserError(f"{path}: this is a folder; name the files in it, as in {path.rstrip('/')}/*.jsonl")
    # a missing `data/train.jsonl` looks like org/name too, and must not be asked of the hub
    is_file_name = Path(path).suffix in (*SUFFIXES, *COMPRESSED)
    if path == local and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not is_file_name:
        return None
    raise MissingError(
        f"{path}: no such file (seen from {Path.cwd()}); correct the path, or write org/name for the hub"
    )


def _check_suffix(file: Path) -> Path:
    is_packed_table = file.suffix in COMPRESSED and format_suffix(file) in _TABLES
    if format_suffix(file) not in SUFFIXES or is_packed_table:
        raise UserError(
            f"{file}: files end in {', '.join(SUFFIXES)}, those of text also in {' or '.join(COMPRESSED)} behind it; "
            "rename or convert this one"
        )
    return file


def _read_file(file: Path) -> Iterator[Row]:
    return _read_table(file) if file.suffix in _TABLES else read_text_file(file)


def _read_table(file: Path) -> Iterator[Row]:
    kind = _TABLES[file.suffix]
    with file.open("rb") as data:
        if kind == "Parquet" and data.read(4) != b"PAR1":  # `datasets` would log a traceback as well
            raise UserError(f"{file}: this is no Parquet file; write it again, or give it the right suffix")
    settings = {"data_files": str(file), "split": "train", "streaming": True}
    return _guarded(lambda: _load_dataset(kind.lower(), **settings), str(file), kind)


def _read_saved(folder: Path) -> Iterator[Row]:
    import datasets  # pyright: ignore[reportMissingTypeStubs]  # has none

    load = cast("Callable[[str], Any]", datasets.load_from_disk)  # pyright: ignore[reportUnknownMemberType]
    return _guarded(lambda: load(str(folder)), str(folder), "a saved dataset")


def _guarded(load: Callable[[], Any], name: str, kind: str) -> Iterator[Row]:
    """The rows of a table, and UserError where it is broken: pyarrow has a dozen classes for that."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it would describe the same error beside ours
    number = 0
    try:
        for row in _read_dataset(load(), name):
            number = row.line
            yield row
    except UserError:
        raise
    except Exception as error:
        place = f"{name}:{number + 1}" if number else name
        raise UserError(
            f"{place}: cannot be read as {kind} ({_first_line(error)}); write it again"
        ) from error


def _load_hub(source: Source) -> Any:
    from datasets import config as settings  # pyright: ignore[reportMissingTypeStubs]  # has none

    offline = settings.HF_HUB_OFFLINE
    settings.HF_HUB_OFFLINE = offline or not _hub_answers(source.path)
    try:
        return _load_part(source)
    except Exception as error:  # the hub's clients raise classes of five libraries
        raise MissingError(
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
        yield Row(name, number, _without_nulls(values))


def _without_nulls(value: Any) -> Any:
    """A table's value without the null fields of its objects.

    Columns of objects have the keys of all rows, and fill what a row lacks with null: the arguments of a call would be
    trained with parameters of other calls, and no such table says which nulls were written on purpose.
    """
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {key: _without_nulls(item) for key, item in items if item is not None}
    return [_without_nulls(item) for item in cast("list[Any]", value)] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _hash_file(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "blake2b").hexdigest()
