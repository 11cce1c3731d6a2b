"""`train`: runs a config of any stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuner.config import StageConfig
from tuner.display.notebook import NotebookWatcher, in_notebook
from tuner.display.progress import ProgressWatcher
from tuner.errors import UserError
from tuner.models.device_errors import full_memory, is_memory_full
from tuner.stages.card_file import write_card
from tuner.stages.context import Context
from tuner.stages.memory_choice import remedy_for_full_memory, with_chosen_memory
from tuner.stages.registry import stage_of
from tuner.stages.run import Run
from tuner.training import heartbeat
from tuner.training.checkpoint import explain_write
from tuner.training.devices import Devices
from tuner.training.figures import StageFigures
from tuner.training.stop_signals import Interrupted
from tuner.training.wandb_tracker import WandbTracker
from tuner.training.watchers import Outcome, Watcher, Watchers


def train(
    config: StageConfig,
    *,
    runs: Path | str = "runs",
    overrides: Sequence[str] = (),
    watchers: Sequence[Watcher] = (),
) -> Run:
    """Train `config` in `runs`/`config.name`, or resume it from its last checkpoint; returns the run.

    watchers: further ones beside the progress display and the config's tracker; only the main process has any.

    Jupyter shows a live table and curve, and an interrupt there saves a checkpoint and returns. Elsewhere it raises
    `tuner.training.stop_signals.Interrupted` after saving. Raises UserError on bad input.
    """
    if config.name is None:
        raise UserError("this config has no name: write name='...', which is also the run's folder")
    return train_in(Run(Path(runs) / config.name), config, overrides=overrides, watchers=watchers)


def train_in(
    run: Run,
    config: StageConfig,
    *,
    overrides: Sequence[str] | None = None,
    watchers: Sequence[Watcher] = (),
    within: bool = False,
) -> Run:
    """The same in a given folder, whatever the config's name.

    overrides: None: as the run has them. within: another run trains it, which an interrupt ends as well, in Jupyter
    too.
    """
    stage = stage_of(config)
    devices = Devices.of(stage.training_config(config))
    if run.is_finished_by(config):
        return run  # repeating a command neither trains nor overwrites what is finished
    everyone = [*_watchers(config, stage.figures(config)), *watchers]
    audience = Watchers(everyone if devices.is_main else [])
    outcome: Outcome = "failed"
    try:
        if devices.is_main:  # it alone takes the lock; the others wait until bad input has been refused
            run.start(config, overrides, devices.place)
            heartbeat.log_with(run.log)
        devices.wait()
        devices.reset_peak_memory()  # a run before this one, such as a round's, has peaks of its own
        context = Context(run, devices, audience)
        if run.results is not None:
            context.say(f"{run.folder}: there are results, but no model of them; both are made again")
        if not stage.trains_runs:
            config = with_chosen_memory(context.with_usable_models(config), context)
        stage.train(config, context)
        if devices.is_main and run.model_folder.is_dir():
            write_card(run.folder, run.model_folder)
        outcome = "finished"
    except Interrupted as interrupted:
        outcome = "interrupted"
        if devices.is_main:
            run.log(str(interrupted))
        if within or not in_notebook():
            raise
    except (RuntimeError, MemoryError) as error:
        if not is_memory_full(error):
            raise
        # Not abandoned: these fields may be changed, and the same run goes on.
        raise _memory_is_full(run, config, error) from error
    except (UserError, OSError) as error:
        if devices.is_main:
            run.abandon()
        raise explain_write(error, run.folder) from error
    finally:
        audience.end(outcome)
        run.release()
    return run


def _memory_is_full(run: Run, config: StageConfig, error: Exception) -> UserError:
    fields = " or ".join(stage_of(config).memory_fields)
    remedy = remedy_for_full_memory(run, config) or f"lower {fields}, or set gradient_checkpointing=true"
    return UserError(f"{run.folder}: {full_memory(error)}; {remedy}, and the same run goes on")


def _watchers(config: StageConfig, figures: StageFigures) -> list[Watcher]:
    display = NotebookWatcher(figures) if in_notebook() else ProgressWatcher(figures)
    return [display, *([WandbTracker(config.tracking, figures)] if config.tracking else [])]
