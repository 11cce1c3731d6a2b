"""A hash of a model folder's configuration and weights, independent of where it lies."""

import hashlib
import json
import struct
from pathlib import Path

from tuner.models.folder_files import weight_files

_CHUNK = 1 << 16  # bytes
_WHOLE = 1 << 25  # bytes: smaller files are read whole, of larger ones this many in evenly spaced chunks
# fields that depend on where a folder lies and which library wrote it, and change no number
_VOLATILE = ("_name_or_path", "transformers_version", "auto_map", "attn_implementation")


def fingerprint(folder: str | Path) -> str:
    """SHA-256, in hex, of config.json and of the size, header and content of each file of weights.

    Those of a model are the files that it is loaded from, whatever lies beside them; of an adapter, all in its folder.
    Of a file over 32 MiB only 32 MiB in evenly spaced chunks are read: 15 GB take a fraction of a second.
    Raises OSError when the folder cannot be read, and UserError where a file that its index names is missing.
    """
    digest = hashlib.sha256()
    config = Path(folder, "config.json")
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        stable = {name: value for name, value in values.items() if name not in _VOLATILE}
        digest.update(json.dumps(stable, sort_keys=True).encode())
    of_model = any(Path(folder).glob("model.safetensors*"))
    for file in weight_files(Path(folder)) if of_model else sorted(Path(folder).glob("*.safetensors")):
        digest.update(file.name.encode())
        _add_weights(digest, file)
    return digest.hexdigest()


def _add_weights(digest: "hashlib._Hash", file: Path) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        if size <= _WHOLE:
            digest.update(stream.read())
            return
        (header,) = struct.unpack("<Q", stream.read(8))
        digest.update(stream.read(min(header, size)))  # a damaged file may claim any length
        chunks = _WHOLE // _CHUNK
        for chunk in range(chunks):
            stream.seek((size - _CHUNK) * chunk // (chunks - 1))
            digest.update(stream.read(_CHUNK))
