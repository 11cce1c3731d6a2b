"""What the config and the file system alone can refuse, before torch is imported, which takes seconds.

Whatever is loaded later refuses the same with the same sentences: nothing depends on this but how soon it is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from tuner.config import Model, Parallel, Source, StageConfig
from tuner.config.base import ConfigBase
from tuner.config.functions import is_function_reference
from tuner.config.model import refuse_missing_model
from tuner.config.serialization import leaves
from tuner.data.conditions import read_conditions
from tuner.data.sources import refuse_missing_files
from tuner.errors import UserError
from tuner.training.run_folder import RunFolder


def preflight(config: StageConfig, folder: Path | None = None) -> None:
    """Raise UserError where a file, model or function that a config names is missing, or its run has another config.

    folder: the run's; None: it is not looked at.
    """
    for part in _parts(config):
        if isinstance(part, Model):
            refuse_missing_model(part.path)
        read_conditions(getattr(part, "conditions", None) or {})
        for field in ("sources", "validation_sources", "test_sources"):
            for source in cast("tuple[Source, ...]", getattr(part, field, ())):
                refuse_missing_files(source)
    for leaf in leaves(config):
        if is_function_reference(leaf.value) and not Path(leaf.value.rpartition(":")[0]).is_file():
            raise UserError(f"{leaf.path} {leaf.value!r}: no such file; write file.py:function")
    if folder is not None and (folder / "config.json").is_file():
        RunFolder(folder).refuse_changes(config)


def refuse_layout(config: StageConfig, processes: int) -> None:
    """Raise UserError where so many processes cannot be laid out as a config says."""
    for part in _parts(config):
        if isinstance(part, Parallel):
            part.refuse(processes)


def _parts(config: ConfigBase) -> Iterator[ConfigBase]:
    """A config and all configs within it."""
    yield config
    values: list[Any] = [getattr(config, name) for name in type(config).model_fields]
    for value in values:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, ConfigBase):
                yield from _parts(item)
