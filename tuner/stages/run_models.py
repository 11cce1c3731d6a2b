"""Runs that have not finished, and checkpoints, as models.

`runs/NAME` of an unfinished run is the model of its newest intact checkpoint, and
`runs/NAME/checkpoints/step_000040` that of this one. The model's folder is written into the checkpoint when it is first
needed: it is named by the step, and goes when the checkpoint goes. Other modules call this one with what the user
wrote, before they look for a model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.config import Model, StageConfig, override
from tuner.errors import UserError
from tuner.printable import echo
from tuner.resources import locate as locate_shipped
from tuner.stages.registry import stage_of
from tuner.training.checkpoint_names import checkpoints_in, is_checkpoint, step_of
from tuner.training.run_folder import RunFolder

if TYPE_CHECKING:
    from tuner.models.scorer import Scorer

MODEL_FOLDER = "model"
"""Where a checkpoint keeps its model, as a run folder does: models are looked for there."""


def _to_console(text: str) -> None:
    echo(text, sys.stderr)  # stdout may carry rows or JSON


def usable_path(path: str, *, trust: bool = False, say: Callable[[str], None] = _to_console) -> str:
    """The path under which models are loaded that the user names so: the same, but for runs that have not finished.

    trust: let the model that the run began with run Python code of its own. say: takes a sentence on which model is
    used. Raises UserError where an unfinished run has no intact checkpoint, or its base is gone.
    """
    place = Path(locate_shipped(path))
    run = RunFolder(run_folder_of(place))
    if not is_run(run.folder):
        if is_checkpoint(place) and not (place / MODEL_FOLDER).is_dir():
            raise UserError(
                f"{path}: this checkpoint is not in its run's folder, whose config.json says what model it is of; put "
                "it back into RUN/checkpoints"
            )
        return path
    if run.folder == place:
        if (run.folder / "results.json").exists() and run.model_folder.is_dir():
            return path
        if not checkpoints_in(run.checkpoints_folder) and run.model_folder.is_dir():
            return path
        stage = stage_of(run.config)
        if stage.trains_runs:
            return _newest_part(stage.newest_part(run.folder, run.config), path, say)
        place = _newest(run, path, say)
    _write_model(run, place, trust, say)
    return str(place)


def open_scorer(path: Path | str, *, trust: bool = False, **options: Any) -> Scorer:
    """A reward model to score with: a run, finished or not, a checkpoint, a folder or a hub name.

    options: those of `tuner.models.scorer.open_scorer`. trust: let the model run Python code of its own. Raises
    UserError where there is no such model, or it is no reward model.
    """
    from tuner.models.scorer import open_scorer as open_folder  # imports torch

    return open_folder(usable_path(str(path), trust=trust), trust=trust, **options)


def usable_models(config: StageConfig, say: Callable[[str], None] = _to_console) -> dict[str, str]:
    """Changes of a config by which the models it names are found: field -> the path to use instead."""
    changes: dict[str, str] = {}
    for field, model in stage_of(config).model_fields(config).items():
        path = usable_path(model.path, trust=model.trust_remote_code, say=say)
        if path != model.path:
            changes[f"{field}.path"] = path
    return changes


def with_usable_models(config: StageConfig) -> StageConfig:
    """The config with these changes."""
    changes = usable_models(config)
    return override(config, changes) if changes else config


def write_milestone(run: RunFolder, checkpoint: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Write the model of a run's checkpoint to a folder of its own; whoever trains vouches for the model's code."""
    from tuner.stages.model_folder import write_checkpoint_model  # imports torch

    config: StageConfig = run.config
    trusts_code = stage_of(config).trained_model(config).model.trust_remote_code
    write_checkpoint_model(run, checkpoint, folder, model=_starting_model(config, trusts_code, say))


def run_folder_of(place: Path | str) -> Path:
    """The run folder that a checkpoint stands in; of any other place itself."""
    folder = Path(place)
    return folder.parent.parent if is_checkpoint(folder) and is_run(folder.parent.parent) else folder


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, finished or not."""
    # a model's folder has a config.json, too
    return (folder / "config.json").is_file() and (folder / "versions.json").is_file()


def _newest_part(folder: Path | None, path: str, say: Callable[[str], None]) -> str:
    """The newest model among the runs of an unfinished run."""
    if folder is None:
        raise UserError(f"{path}: this run has no model yet; train it on, or name one of the runs in it")
    say(f"{path}: this run has not finished; its model is that of {folder}")
    return str(folder)


def _newest(run: RunFolder, path: str, say: Callable[[str], None]) -> Path:
    """The newest intact checkpoint of a run."""
    from tuner.stages.model_folder import check_checkpoint  # imports torch

    for checkpoint in reversed(checkpoints_in(run.checkpoints_folder)):
        try:
            check_checkpoint(checkpoint)
        except UserError as error:
            say(f"{error}; the one before is tried")
            continue
        say(
            f"{path}: this run has not finished; its model is that of its newest checkpoint, {checkpoint.name}"
        )
        return checkpoint
    raise UserError(
        f"{path}: this run has not finished and has no intact checkpoint, so it is no model yet; train it on, or lower "
        "checkpoint.every to have one sooner"
    )


def _write_model(run: RunFolder, checkpoint: Path, trust: bool, say: Callable[[str], None]) -> None:
    folder = checkpoint / MODEL_FOLDER
    if folder.is_dir():
        return
    from tuner.stages.model_folder import write_checkpoint_model
    from tuner.training.checkpoint import explain_write

    say(f"{checkpoint}: writing the model of step {step_of(checkpoint):,}")
    try:
        write_checkpoint_model(run, checkpoint, folder, model=_starting_model(run.config, trust, say))
    except OSError as error:
        raise explain_write(error, run.folder) from error


def _starting_model(config: StageConfig, trust: bool, say: Callable[[str], None]) -> Model:
    """The model that a run began with. The folder may be somebody else's: it cannot vouch for code."""
    model: Any = stage_of(config).trained_model(config).model
    path = usable_path(model.path, trust=trust, say=say)
    return model.model_copy(update={"path": path, "trust_remote_code": trust})
