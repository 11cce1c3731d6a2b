"""`tuner train --stop`: a run ended early, with a model of what it has learned so far."""

from __future__ import annotations

from pathlib import Path

from tuner.config import override
from tuner.errors import UserError
from tuner.stages.registry import stage_of
from tuner.stages.run import Run, open_run
from tuner.stages.train import train_in
from tuner.stages.trust import code_named_by, refuse_code
from tuner.training.checkpoint_names import checkpoints_in


def end_run(folder: Path, *, trust: bool = False) -> Run | None:
    """End a run after its running step, or where no process trains it at its last checkpoint; returns the ended run.

    None where another process trains it: that one finishes its step, writes the model, and ends with exit code 0.
    trust: the user's word for code that the run's config names. Raises UserError where the run has finished already,
    or has no checkpoint to end at.
    """
    run = open_run(folder)
    if run.is_finished:
        raise UserError(f"{folder}: this run has finished, so there is nothing to stop")
    if stage_of(run.config).trains_runs:
        raise UserError(
            f"{folder}: is made of several runs; end the one that is training, which this one then goes on from"
        )
    if run.is_training:
        run.request_end()
        return None
    if not checkpoints_in(run.checkpoints_folder):
        raise UserError(f"{folder}: this run has no checkpoint yet, so there is nothing to make a model of")
    config = override(run.config, {"parallel": {}})  # this process alone ends what several may have trained
    if not trust:
        refuse_code(folder, code_named_by(config))
    run.request_end()
    try:
        return train_in(run, config)
    except BaseException:
        run.withdraw_end()  # or the next process that goes on with it would end it
        raise
