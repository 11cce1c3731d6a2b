"""Small stand-ins for the models and rows of a config that are not on this machine: `tuner check --tiny`."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

from tuner.config import Source, StageConfig, override
from tuner.models.tiny import tiny_model_folder
from tuner.resources import PREFIX, row_examples_folder
from tuner.stages.stage import Stage

SCORING = ("reward", "further_rewards")
"""Names of config fields whose models have a scalar head."""


def with_stand_ins(
    stage: Stage[Any], config: StageConfig, folder: Path
) -> tuple[StageConfig, frozenset[str], tuple[str, ...]]:
    """The config with small random models, and rows of data_templates, for those that are not on this machine.

    folder: where the models are written. Returns, second, the config fields whose model is a stand-in, and third the
    paths that were replaced.
    """
    changes: dict[str, Any] = {}
    stand_ins: list[str] = []
    replaced: list[str] = []
    for field, model in stage.model_fields(config).items():
        if not _is_here(model.path):
            *_, name = (part for part in field.split(".") if not part.isdigit())
            small = tiny_model_folder(model.path, folder / field, score=name in SCORING)
            # A stand-in is a folder, and a revision of a folder is refused.
            changes |= {f"{field}.path": str(small), f"{field}.revision": None}
            stand_ins.append(field)
            replaced.append(model.path)
    changes |= stage.tiny_changes(config, frozenset(stand_ins))
    rows, missing = example_rows(stage, config)
    return override(config, changes | rows), frozenset(stand_ins), (*replaced, *missing)


def example_rows(stage: Stage[Any], config: StageConfig) -> tuple[dict[str, Any], list[str]]:
    """Changes of a config that put rows of data_templates in place of missing ones, and the paths of these."""
    changes: dict[str, Any] = {}
    replaced: list[str] = []
    for field in stage.example_rows:
        if (rows := attrgetter(field)(config)) is None:
            continue
        for name in ("files", "validation_files", "test_files"):
            paths = [file.path if isinstance(file, Source) else file for file in getattr(rows, name)]
            if missing := [path for path in paths if not _is_here(path)]:
                changes[f"{field}.{name}"] = [
                    str(row_examples_folder() / stage.example_rows_for(config, field))
                ]
                replaced += missing
    return changes, replaced


def _is_here(path: str) -> bool:
    return (
        path.startswith(PREFIX) or Path(path).exists() or bool(list(Path().glob(path)) if "*" in path else ())
    )
