"""The stages, and the one way to run them: `train`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.config import StageConfig
from tuner.errors import UserError

if TYPE_CHECKING:
    from tuner.stages.run import Run
    from tuner.training.figures import StageFigures


def train(config: StageConfig, *, runs: Path | str = "runs", overrides: Sequence[str] = ()) -> Run:
    """Train `config` in `runs`/`config.name`, or go on where it stopped; returns the run.

    In Jupyter a live table and curve are shown, and an interrupt saves a checkpoint and returns. Elsewhere
    an interrupt raises `tuner.training.loop.Interrupted` after saving. Raises UserError on bad input.
    """
    import torch

    from tuner.display.notebook import in_notebook
    from tuner.stages.job import Job
    from tuner.stages.run import Run
    from tuner.training.checkpoint import explain_write
    from tuner.training.devices import Devices
    from tuner.training.loop import Interrupted
    from tuner.training.watchers import Outcome, Watchers

    if config.name is None:
        raise UserError("this config has no name: write name='...', which is also the run's folder")
    devices = Devices(config)
    run = Run(Path(runs) / config.name)
    if run.results is not None and not run.changes(config):
        return run
    watchers = Watchers(_watchers(config) if devices.is_main else [])
    outcome: Outcome = "failed"
    try:
        if devices.is_main:
            run.start(config, overrides, devices.place)
        devices.wait()
        _stage(config)(config, Job(run, devices, watchers))
        outcome = "finished"
    except Interrupted as interrupted:
        outcome = "interrupted"
        if devices.is_main:
            run.log(str(interrupted))
        if not in_notebook():
            raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{run.folder}: the GPU's memory is full; lower tokens_per_pass (DPO: pairs_per_pass; PPO: "
            "sampling.cache_gib, too) or set gradient_checkpointing=true, and the same run goes on"
        ) from error
    except (UserError, OSError) as error:
        if devices.is_main:
            run.abandon()
        raise explain_write(error, run.folder) from error
    finally:
        watchers.end(outcome)
        run.release()
    return run


def _stage(config: StageConfig) -> Callable[..., None]:
    from tuner.config import DPO, PPO, SFT, RewardModel
    from tuner.stages.reward.loop import reward
    from tuner.stages.rl.loop import ppo
    from tuner.stages.sft.loop import sft

    if isinstance(config, DPO):
        from tuner.stages.dpo.loop import dpo  # the others need no TRL

        return dpo
    return {SFT: sft, RewardModel: reward, PPO: ppo}[type(config)]


def _watchers(config: StageConfig) -> list[Any]:
    from tuner.display.notebook import NotebookWatcher, in_notebook
    from tuner.display.progress import ProgressWatcher
    from tuner.training.wandb_tracker import WandbTracker

    figures = figures_of(config)
    watchers: list[Any] = [NotebookWatcher(figures) if in_notebook() else ProgressWatcher(figures)]
    return watchers + ([WandbTracker(config.tracking, figures)] if config.tracking else [])


def figures_of(config: StageConfig) -> StageFigures:
    """What is shown of a config's stage; needs no torch."""
    stage: str = config.stage  # type: ignore[attr-defined]
    if stage in ("ppo", "grpo", "rloo"):
        from tuner.stages.rl.figures import figures

        return figures(stage, critic=stage == "ppo")
    return importlib.import_module(f"tuner.stages.{stage}.figures").FIGURES
