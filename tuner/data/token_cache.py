"""Tokenised data on disk, keyed by everything it was made from; safe under several processes."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import numpy as np

from tuner.config.data import Data, Prompts, Source, Text
from tuner.data.comparisons import Comparisons
from tuner.data.data_report import DataReport
from tuner.data.encoding import Tokenizer, serialise
from tuner.data.examples import Examples
from tuner.data.prompts import PromptSet
from tuner.data.row_shapes import fingerprint_of_registered
from tuner.data.sources import Rows
from tuner.data.template import find_source

CODE = (
    "token_cache",
    "comparisons",
    "conditions",
    "conversation",
    "examples",
    "dataset",
    "load_pairs",
    "load_preferences",
    "load_prompts",
    "preference_rows",
    "prompt_rows",
    "prompts",
    "data_report",
    "row_shapes",
    "conversation_rows",
    "sources",
    "split",
    "template",
    "encoding",
    "turns",
)
"""The modules that decide what is learned: a change in any of them makes every entry stale."""

Parts = dict[str, Any]
"""Examples, Comparisons or a PromptSet by the name of the part."""
KINDS: dict[str, type] = {kind.__name__: kind for kind in (Examples, Comparisons, PromptSet)}


def cache_folder(data: Data | Prompts) -> Path:
    """Where the entries lie: the config's folder, $TUNER_CACHE, or ~/.cache/tuner."""
    return Path(data.cache or os.environ.get("TUNER_CACHE") or "~/.cache/tuner").expanduser()


def cache_key(
    data: Data | Prompts,
    tokenizer: Tokenizer,
    rows: list[Rows],
    others: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Hash of the rows, the tokenizer, the template's text, the data fields that matter, `others`, and this code."""
    fields = data.model_dump(
        mode="json", exclude={"cache", "files", "validation_files", "test_files", "limit"}
    )
    made_from = {
        "fields": fields,
        "sources": [[_fields(one.source), one.identity()] for one in rows],
        "counts": [len(data.sources), len(data.validation_sources), len(data.test_sources)],
        "template": None if isinstance(data, Text) else find_source(data.template, tokenizer),
        "others": dict(others),
        "registered shapes": fingerprint_of_registered(),
        "tokenizer": serialise(tokenizer),
        "code": code_hash(),
    }
    return hashlib.blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=16).hexdigest()


def code_hash() -> str:
    """Hash of the source of the modules named in CODE, and of the version of tokenizers."""
    import tokenizers

    digest = hashlib.blake2b(tokenizers.__version__.encode(), digest_size=16)
    for name in CODE:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


def load_entry(folder: Path, key: str) -> tuple[Parts, DataReport, str] | None:
    """Parts, report and fingerprint of an entry, memory-mapped; None when there is none or it is damaged."""
    entry = folder / key
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        arrays = {name: _load(entry / name, crc) for name, crc in meta["arrays"].items()}
        parts = {
            name: _restored(KINDS[part["kind"]], f"{name}.", arrays, part["texts"])
            for name, part in meta["parts"].items()
        }
        return parts, DataReport.from_dict(meta["report"]), meta["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_entry(folder: Path, key: str, parts: Parts, report: DataReport, fingerprint: str) -> None:
    """Write an entry beside its place and rename it into it, so that nobody ever reads half of one."""
    temporary = folder / f".{key}.{os.getpid()}.{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        arrays = {}
        for part, examples in parts.items():
            for name, array in _leaves(examples, f"{part}.", np.ndarray):
                arrays[f"{name}.npy"] = _save(temporary / f"{name}.npy", array)
        meta = {
            "parts": {
                part: {"kind": type(examples).__name__, "texts": dict(_leaves(examples, f"{part}.", tuple))}
                for part, examples in parts.items()
            },
            "arrays": arrays,
            "report": report.to_dict(),
            "fingerprint": fingerprint,
        }
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        damaged = folder / f".{key}.{uuid.uuid4().hex}.old"
        with contextlib.suppress(OSError):  # a damaged entry in the way, or none
            (folder / key).rename(damaged)
        with contextlib.suppress(OSError):  # another process was first: its entry is as good
            temporary.rename(folder / key)
        shutil.rmtree(damaged, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Let one process at a time build an entry; the others wait and then find it.

    Only saves work: a file system without locks costs every process its own build, and no more.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / f".{key}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel when the process ends, however it ends
        yield


def _fields(source: Source) -> dict[str, Any]:
    """What of a source decides its tokens; its share does not. A user's function counts with its file."""
    fields = source.model_dump(mode="json", exclude={"share"})
    file = Path(str(source.shape).rpartition(":")[0])
    if ":" in str(source.shape) and file.is_file():
        fields["function"] = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    return fields


def _leaves(part: Any, prefix: str, kind: type) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field of this kind, in a dataclass and those in it."""
    for field in fields(part):
        value, name = getattr(part, field.name), f"{prefix}{field.name}"
        if isinstance(value, kind):
            yield name, value
        elif is_dataclass(value):
            yield from _leaves(value, f"{name}.", kind)


def _restored(kind: Any, prefix: str, arrays: dict[str, np.ndarray], texts: dict[str, list[str]]) -> Any:
    """The dataclass whose arrays and tuples of texts `_leaves` has named."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        path = f"{prefix}{name}"
        if is_dataclass(hint):
            values[name] = _restored(hint, f"{path}.", arrays, texts)
        else:
            values[name] = arrays[f"{path}.npy"] if hint is np.ndarray else tuple(texts[path])
    return kind(**values)


def _save(path: Path, array: np.ndarray) -> int:
    np.save(path, array)
    return zlib.crc32(np.ascontiguousarray(array).data)


def _load(path: Path, crc: int) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if zlib.crc32(np.ascontiguousarray(array).data) != crc:
        raise ValueError(f"{path}: damaged")
    return array
