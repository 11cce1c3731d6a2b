"""The record of the base a model was trained on: `tuner.json`, beside the weights."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tuner
from tuner import config
from tuner.models.folder_files import STRICT, read_file

FILE = "tuner.json"


@dataclass(frozen=True)
class BaseReference:
    """Identifies a base model: where it is found, and the fingerprint it must have."""

    __pydantic_config__ = STRICT

    path: str
    """As in the config: hub name, folder, run folder, or `tuner:tiny`."""

    revision: str | None
    """Commit on the hub; None for folders."""

    fingerprint: str
    """Of the folder's configuration and weights, independent of where it lies."""

    quantization: Literal["nf4", "int8"] | None
    """Quantization of the base in training."""

    rope: config.Rope | None
    """Long-context settings of the base in training."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of its unquantized weights; weights are rounded to it before they are quantized."""

    embedding_rows: int | None = None
    """Rows of its embedding in training, where rows were added for new tokens; None: those in its file."""

    found_at: str | None = None
    """Absolute folder it was read from, used where `path` is no longer found; None for hub models."""


@dataclass(frozen=True)
class Record:
    """The content of tuner.json."""

    __pydantic_config__ = STRICT
    base: BaseReference
    adapter: config.Adapter | None = None
    """Settings of the adapter; None for full weights."""
    tuner_version: str = ""


def write_record(folder: Path, base: BaseReference, adapter: config.Adapter | None) -> None:
    """Write tuner.json into a model folder."""
    values = {
        "tuner_version": tuner.__version__,
        # asdict leaves a config value an object, which JSON cannot write
        "base": asdict(replace(base, rope=None)) | {"rope": _dump(base.rope)},
        "adapter": _dump(adapter),
    }
    Path(folder, FILE).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Record | None:
    """tuner.json of a model folder; None where there is none. Raises UserError when it cannot be read."""
    file = Path(folder, FILE)
    if not file.is_file():
        return None
    return read_file(file, Record)


def _dump(part: config.Rope | config.Adapter | None) -> dict[str, Any] | None:
    return part.model_dump(mode="json") if part is not None else None
