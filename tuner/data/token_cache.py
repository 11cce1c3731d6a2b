"""The cache of tokenized data on disk, keyed by all that decides it; safe under several processes."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import numpy as np

from tuner.config.data import Data, Prompts, Source, Text
from tuner.config.functions import is_function_reference
from tuner.config.imported_files import imported_files
from tuner.data.comparisons import Comparisons
from tuner.data.data_report import DataReport
from tuner.data.encoding import Tokenizer, serialize
from tuner.data.examples import Examples
from tuner.data.labels import Labels
from tuner.data.prompts import PromptSet
from tuner.data.row_shapes import registered_fingerprints
from tuner.data.sources import Rows
from tuner.data.template import find_source

CODE = (
    "token_cache",
    "answers",
    "comparisons",
    "conditions",
    "control_tokens",
    "conversation",
    "examples",
    "dataset",
    "labels",
    "load_examples",
    "load_labels",
    "load_pairs",
    "load_preferences",
    "load_prompts",
    "lost_content",
    "preference_rows",
    "prompt_rows",
    "rollout_rows",
    "prompts",
    "rendered",
    "sandbox",
    "data_report",
    "row_files",
    "row_shapes",
    "conversation_rows",
    "sources",
    "split",
    "template",
    "template_program",
    "encoding",
    "turns",
)
"""The modules that decide the tokens and weights: a change in any of them makes every entry stale."""

KINDS: dict[str, type] = {kind.__name__: kind for kind in (Examples, Comparisons, Labels, PromptSet)}
"""The classes of parts by name."""
Parts = Mapping[str, Examples | Comparisons | Labels | PromptSet]
"""Name of a part -> its samples."""


def cache_folder(data: Data | Prompts) -> Path:
    """The folder of the entries: the config's, $TUNER_CACHE, or ~/.cache/tuner."""
    return Path(data.cache or os.environ.get("TUNER_CACHE") or "~/.cache/tuner").expanduser()


def cache_key(
    data: Data | Prompts,
    tokenizer: Tokenizer,
    rows: list[Rows],
    others: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Hash of the rows, the tokenizer, the template's text, the config fields that matter, `others`, and this code."""
    fields = data.model_dump(
        mode="json", exclude={"cache", "files", "validation_files", "test_files", "limit"}
    )
    inputs: dict[str, Any] = {
        "fields": fields,
        "sources": [[_source_fields(source_rows.source), source_rows.identity()] for source_rows in rows],
        # the sources are listed flat: which of them are held out is told by the counts alone
        "counts": [len(data.sources), len(data.validation_sources), len(data.test_sources)],
        # the text: a .jinja file, or a tokenizer's template, can change under the same name
        "template": None if isinstance(data, Text) else find_source(data.template, tokenizer),
        "others": dict(others),
        "registered shapes": registered_fingerprints(),
        "tokenizer": serialize(tokenizer),
        "code": code_hash(),
    }
    return hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16).hexdigest()


def code_hash() -> str:
    """Hash of the source of the modules named in CODE, and of the version of tokenizers."""
    import tokenizers

    # the package is code that decides the ids, as much as the modules below
    digest = hashlib.blake2b(tokenizers.__version__.encode(), digest_size=16)
    for name in CODE:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


def load_entry(folder: Path, key: str) -> tuple[dict[str, Any], DataReport, str] | None:
    """Parts (memory-mapped), report and fingerprint of an entry; None when there is none or it is damaged."""
    entry = folder / key
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        arrays = {name: _load(entry / name, crc) for name, crc in meta["arrays"].items()}
        parts = {
            name: _rebuild(KINDS[part["kind"]], f"{name}.", arrays, part["texts"])
            for name, part in meta["parts"].items()
        }
        return parts, DataReport.from_dict(meta["report"]), meta["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_entry(folder: Path, key: str, parts: Parts, report: DataReport, fingerprint: str) -> None:
    """Write an entry under a temporary name and rename it, so that no process ever reads half of one."""
    # in the same folder, since a rename is atomic only within a file system
    temporary = folder / f".{key}.{os.getpid()}.{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        checksums: dict[str, int] = {}
        for part, examples in parts.items():
            for name, array in _leaves(examples, f"{part}.", np.ndarray):
                checksums[f"{name}.npy"] = _save(temporary / f"{name}.npy", array)
        meta: dict[str, Any] = {
            "parts": {
                part: {"kind": type(examples).__name__, "texts": dict(_leaves(examples, f"{part}.", tuple))}
                for part, examples in parts.items()
            },
            "arrays": checksums,
            "report": report.to_dict(),
            "fingerprint": fingerprint,
        }
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        # moved aside first: rename cannot replace a folder that is not empty
        damaged = folder / f".{key}.{uuid.uuid4().hex}.old"
        with contextlib.suppress(OSError):  # a damaged entry in the way, or none
            (folder / key).rename(damaged)
        with contextlib.suppress(OSError):  # another process was first: its entry is as good
            temporary.rename(folder / key)
        shutil.rmtree(damaged, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, key: str) -> Generator[None]:
    """A lock under which one process builds an entry; the others wait for it, and then load it.

    It only saves work: on a file system without locks every process builds the entry itself.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            # Windows has no fcntl
            import fcntl

            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / f".{key}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel when the process ends, however it ends
        yield


def _source_fields(source: Source) -> dict[str, Any]:
    """The fields of a source that decide its tokens (its share does not), and the hash of a user's function's files."""
    fields = source.model_dump(mode="json", exclude={"share"})
    if is_function_reference(source.shape):
        file = Path(str(source.shape).rpartition(":")[0])
        if file.is_file():
            digest = hashlib.blake2b(digest_size=16)
            for code in (file, *imported_files(file)):
                digest.update(hashlib.blake2b(code.read_bytes()).digest())
            fields["function"] = digest.hexdigest()
    return fields


def _leaves(part: Any, prefix: str, kind: type) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field of this type, in a dataclass and those nested in it."""
    for field in fields(part):
        value, name = getattr(part, field.name), f"{prefix}{field.name}"
        if isinstance(value, kind):
            yield name, value
        elif is_dataclass(value):
            yield from _leaves(value, f"{name}.", kind)


def _rebuild(kind: Any, prefix: str, arrays: dict[str, np.ndarray], texts: dict[str, list[str]]) -> Any:
    """The dataclass of this type, from the arrays and tuples of texts that `_leaves` named."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        path = f"{prefix}{name}"
        if is_dataclass(hint):
            values[name] = _rebuild(hint, f"{path}.", arrays, texts)
        else:
            values[name] = arrays[f"{path}.npy"] if hint is np.ndarray else tuple(texts[path])
    return kind(**values)


def _save(path: Path, array: np.ndarray) -> int:
    np.save(path, array)
    return zlib.crc32(np.ascontiguousarray(array).data)


def _load(path: Path, crc: int) -> np.ndarray:
    # np.load checks header and size alone: flipped bytes would be trained on without the checksum
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if zlib.crc32(np.ascontiguousarray(array).data) != crc:
        raise ValueError(f"{path}: damaged")
    return array
