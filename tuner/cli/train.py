"""`tuner train`: a config becomes a run, here or in several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tuner.stages.run import Run


def train(
    config: Annotated[str, typer.Argument(help="Config file, or the name of one that comes with tuner.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the config: key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder the run's folder is made in.")] = Path("runs"),
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per GPU.")] = 1,
) -> None:
    """Train a config, or go on where it stopped. A changed config is refused with its differences."""
    from tuner.config import load_config, override

    changes = overrides or []
    value = override(load_config(config), changes)
    if processes > 1 and "LOCAL_RANK" not in os.environ:
        from tuner.cli.launch import launch

        raise typer.Exit(launch(["train", config, *changes, "--runs", str(runs)], processes))
    from tuner.stages.train import train as train_config
    from tuner.training.stopping import Interrupted

    try:
        run = train_config(value, runs=runs, overrides=changes)
    except Interrupted as interrupted:
        if _is_main():
            typer.echo(f"tuner: {interrupted}; the same command goes on", err=True)
        raise typer.Exit(interrupted.exit_code) from None
    if _is_main():
        _print_summary(run)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_summary(run: Run) -> None:
    """The measures of a finished run, where its files are, and what to type next."""
    from tuner.stages.registry import stage_of

    results = run.results or {}
    for name in ("before", "after", "seen", "unseen", "novel", "blank", "swapped", "overall"):
        measures = {key: value for key, value in results.get(name, {}).items() if isinstance(value, float)}
        if measures:
            typer.echo(
                f"{name + ':':<9}" + "  ".join(f"{key} {value:.4f}" for key, value in measures.items())
            )
    lines = {"model": str(run.model_folder), "curves": str(run.folder / "curves.png")}
    for name, text in {**lines, **stage_of(run.config).closing_lines(run)}.items():
        typer.echo(f"{name + ':':<9}{text}")
