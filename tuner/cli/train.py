"""`tuner train`: train a config, in this process or in several."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.trust import Trust
from tuner.printable import echo

if TYPE_CHECKING:
    from tuner.config import StageConfig
    from tuner.stages.run import Run


def train(
    config: Annotated[
        str | None, typer.Argument(help="Config file, or name of a shipped config (see `tuner configs`).")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Config overrides, such as optimizer.lr=1e-4.", metavar="[KEY=VALUE]..."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder in which the run's folder is created.")] = Path("runs"),
    processes: Annotated[
        int, typer.Option(min=1, help="Number of processes on this machine, one per GPU.")
    ] = 1,
    stop: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Instead of training: end this run early and make its model what it has learned so far, also where "
            "it is training now in another process. Of a run in rounds, the run in it that is in training ends.",
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Train a config, or resume its interrupted run.

    A run is not resumed with a changed config, but a larger max_steps or more epochs make it longer.
    """
    from tuner.errors import UserError

    if stop is not None:
        if config is not None:
            raise UserError("--stop RUN takes no config: it ends the run as it was begun")
        _stop(stop, trust)
        return
    if config is None:
        raise UserError("train: missing argument 'config'; see `tuner train --help`")
    from tuner.config import load_config, override
    from tuner.stages.preflight import preflight, refuse_layout

    # Before ranks are launched: a mistake in the config is then reported once, not by every rank.
    run_config = override(load_config(config), overrides or [])
    # LOCAL_RANK: under torchrun or accelerate this process is a rank already, and would launch ranks itself.
    is_rank = "LOCAL_RANK" in os.environ
    world = int(os.environ.get("WORLD_SIZE", "1")) if is_rank else processes
    preflight(run_config, runs / str(run_config.name))
    refuse_layout(run_config, world)
    if processes > 1 and not is_rank:
        from tuner.cli.launch import launch

        raise typer.Exit(launch(["train", config, *(overrides or []), "--runs", str(runs)], processes))
    _train(run_config, runs, overrides or [])


def _train(config: StageConfig, runs: Path, overrides: list[str]) -> None:
    """Train in this process."""
    from tuner.stages.train import train as train_config
    from tuner.training.stop_signals import Interrupted

    try:
        run = train_config(config, runs=runs, overrides=overrides)
    except Interrupted as interrupted:
        if _is_main():
            with suppress(OSError):  # the terminal may be closed: that is what SIGHUP says
                echo(f"tuner: {interrupted}; run the same command again to resume", sys.stderr)
        raise typer.Exit(interrupted.exit_code) from None
    if _is_main():
        _print_summary(run)


def _stop(folder: Path, trust: bool) -> None:
    """End a run early: in this process, unless another one trains it."""
    from tuner.stages.end_run import end_run

    ending = end_run(folder, trust=trust)
    run = ending.run
    within = run.folder != folder
    if not ending.has_ended:
        then = f", and goes on with what follows it in {folder}" if within else ""
        echo(
            f"{run.folder}: asked to end; the process that trains it finishes its step and writes the model{then}"
        )
        return
    _print_summary(run)
    if within:
        echo(
            f"{run.folder} has ended; `tuner train` with the config of {folder} goes on with what follows it"
        )


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_summary(run: Run) -> None:
    """Print a finished run's results, where its files are, and what to run next."""
    from tuner.display.table import print_measures
    from tuner.stages.registry import stage_of

    stage = stage_of(run.config)
    print_measures(stage.result_lines(run.results or {}))
    lines = {"model": str(run.model_folder), "curves": str(run.folder / "curves.png")}
    if (run.model_folder / "adapter_config.json").is_file():
        lines["merge"] = (
            f"tuner merge {run.folder} FOLDER; tools that load the adapter itself use its base's chat template and "
            "end tokens"
        )
    for label, text in {**lines, **stage.closing_lines(run)}.items():
        echo(f"{label + ':':<9}{text}")
