"""What a run folder would have executed, and the user's word for it.

A config file that the user names is the user's own. The config inside a run folder is not: the folder may be somebody
else's, and evaluating it would import the files it names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from tuner.config import StageConfig
from tuner.config.base import ConfigBase
from tuner.errors import UserError
from tuner.training.code_fingerprint import functions_of


def code_named_by(config: StageConfig, part: ConfigBase | None = None) -> list[str]:
    """Functions that a config (or only a part of it) names, and its models that may run code of their own."""
    return [*functions_of(config if part is None else part), *_trusted(config.model_dump(mode="json"), "")]


def refuse_code(folder: Path | str, names: list[str], otherwise: str = "") -> None:
    """Raise UserError where a run's config names code. otherwise: what else the user can do."""
    if names:
        raise UserError(
            f"{folder}: its config names code to run ({', '.join(names)}), and a run folder may be somebody else's; "
            f"where you trust it, add --trust{otherwise}"
        )


def _trusted(values: Any, path: str) -> Iterator[str]:
    """Paths of the fields `trust_remote_code` that are true."""
    if isinstance(values, dict):
        for name, value in cast("dict[str, Any]", values).items():
            if name == "trust_remote_code" and value:
                yield f"{path}{name}=true"
            yield from _trusted(value, f"{path}{name}.")
