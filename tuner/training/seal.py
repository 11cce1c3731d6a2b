"""A folder's seal: a JSON file in it with the hash of every other file and of its own content.

It tells a folder that was damaged on its disk, or edited, from the one that was written. It is no signature: whoever
changes a folder on purpose can seal it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.training.json_lines import replace_text

_FILES, _OWN = "files", "sha256"


class BrokenSealError(Exception):
    """The folder is not as it was sealed; the message says which file."""


def seal(folder: Path, name: str, values: dict[str, Any], hashes: Mapping[str, str] | None = None) -> None:
    """Write `values` to the JSON file `name`, with SHA-256 hashes of the folder's other files and of the content.

    hashes: those of the files, by name, where they are known.
    """
    if hashes is None:
        hashes = {path.name: file_hash(path) for path in folder.iterdir() if path.name != name}
    content = {**values, _FILES: dict(sorted(hashes.items()))}
    replace_text(folder / name, json.dumps({**content, _OWN: _hash_text(content)}))


def sealed_values(folder: Path, name: str, share: slice = slice(None)) -> dict[str, Any]:
    """The values that `seal` wrote. Raises BrokenSealError where anything in the folder is not as it was then.

    share: which of the files are read; of the others it is only seen that they are there.
    """
    try:
        content = json.loads((folder / name).read_bytes())
        own, files = content.pop(_OWN), content[_FILES]
        if own != _hash_text(content):
            raise BrokenSealError(f"{name} is not as it was written")
        for file in files:
            (folder / file).stat()
        for file, digest in list(files.items())[share]:
            if file_hash(folder / file) != digest:
                raise BrokenSealError(f"{file} is not as it was written")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise BrokenSealError(f"{name} or a file it lists cannot be read ({reason})") from error
    return {key: value for key, value in content.items() if key != _FILES}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_text(content: dict[str, Any]) -> str:
    # of the values, not of the file's bytes: those hold the hash
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
