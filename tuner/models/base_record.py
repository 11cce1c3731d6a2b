"""What a saved model says of the base it was trained on: `tuner.json`, beside the weights."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tuner
from tuner import config
from tuner.errors import UserError

FILE = "tuner.json"


@dataclass(frozen=True)
class BaseReference:
    """A base model, so that it can be found again and known to be the same."""

    path: str
    """As the user named it: hub name, folder, run folder, or `tuner:tiny`."""

    revision: str | None
    """Commit on the hub; None for folders."""

    fingerprint: str
    """Of the folder's configuration and weights, independent of where it lies."""

    quantization: Literal["nf4", "int8"] | None
    """Precision the base was held in."""

    rope: config.Rope | None
    """Long-context settings that were applied to it."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """What its unquantised weights were held in; NF4 codes are of weights rounded to this first."""

    found_at: str | None = None
    """Absolute folder it was read from, the second place to look; None for hub models."""


@dataclass(frozen=True)
class Record:
    """The content of tuner.json: the base, and the adapter's settings where there is an adapter."""

    base: BaseReference
    adapter: config.LoRA | None
    version: str


def write_record(folder: Path, base: BaseReference, adapter: config.LoRA | None) -> None:
    """Write tuner.json into a model folder."""
    values = {
        "tuner_version": tuner.__version__,
        "base": asdict(replace(base, rope=None)) | {"rope": _dump(base.rope)},
        "adapter": _dump(adapter),
    }
    Path(folder, FILE).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Record | None:
    """tuner.json of a model folder; None where there is none. Raises UserError when it makes no sense."""
    file = Path(folder, FILE)
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        base = values["base"] | {"rope": _parse(config.Rope, values["base"].get("rope"))}
        return Record(
            base=BaseReference(**base),
            adapter=_parse(config.LoRA, values.get("adapter")),
            version=values.get("tuner_version", ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: not the record of a base model ({error}); restore it or train again"
        ) from error


def _dump(part: config.Rope | config.LoRA | None) -> dict[str, Any] | None:
    return part.model_dump(mode="json") if part is not None else None


def _parse(kind: Any, values: dict[str, Any] | None) -> Any:
    return kind.model_validate_json(json.dumps(values)) if values is not None else None
