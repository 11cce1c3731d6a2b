"""`tuner train --stop`: a run ended early, with a model of what it has learned so far."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tuner.config import override
from tuner.errors import UserError
from tuner.stages.registry import stage_of
from tuner.stages.run import Run, open_run
from tuner.stages.train import train_in
from tuner.stages.trust import code_named_by, refuse_code
from tuner.training.checkpoint_names import checkpoints_in


@dataclass(frozen=True)
class Ending:
    """What `--stop` did."""

    run: Run
    """The run that ends: of a run made of runs, the one in it that is in training."""
    has_ended: bool
    """False: another process trains it, which finishes its step, writes the model, and goes on as after any end."""


def end_run(folder: Path, *, trust: bool = False) -> Ending:
    """End a run after its running step, or where no process trains it at its last checkpoint.

    trust: the user's word for code that the run's config names. Raises UserError where the run has finished already,
    has no checkpoint to end at, or is made of runs of which none is in training.
    """
    run = open_run(folder)
    if run.is_finished:
        raise UserError(f"{folder}: this run has finished, so there is nothing to stop")
    is_training = run.is_training
    if stage_of(run.config).trains_runs:
        run = _part_in_training(run)
    if is_training or run.is_training:
        run.request_end()
        return Ending(run, has_ended=False)
    if not checkpoints_in(run.checkpoints_folder):
        raise UserError(
            f"{run.folder}: this run has no checkpoint yet, so there is nothing to make a model of"
        )
    # this process alone ends what several may have trained
    config = override(run.config, {"parallel": {}})
    if not trust:
        refuse_code(run.folder, code_named_by(config))
    run.request_end()
    try:
        return Ending(train_in(run, config), has_ended=True)
    except BaseException:
        run.withdraw_end()  # or the next process that goes on with it would end it
        raise


def _part_in_training(run: Run) -> Run:
    part = stage_of(run.config).unfinished_part(run.folder, run.config)
    if part is None:
        raise UserError(
            f"{run.folder}: none of the runs in it is in training now, so there is nothing to stop; it is between two "
            "of them, or waits for labels"
        )
    return Run(part)
