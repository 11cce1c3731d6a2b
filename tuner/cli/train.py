"""`tuner train`: a config becomes a run, here or in several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


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
    from tuner.stages import train as train_config
    from tuner.training.stopping import Interrupted

    try:
        run = train_config(value, runs=runs, overrides=changes)
    except Interrupted as interrupted:
        if _is_main():
            typer.echo(f"tuner: {interrupted}; the same command goes on", err=True)
        raise typer.Exit(interrupted.exit_code) from None
    if _is_main():
        _tell(run)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _tell(run: object) -> None:
    """What came out, and what to type next."""
    from tuner.config import PPO, RewardModel
    from tuner.training.run_folder import Run

    assert isinstance(run, Run)
    results = run.results or {}
    for name in ("before", "after", "seen", "unseen", "novel", "blank", "swapped", "overall"):
        measured = {key: value for key, value in results.get(name, {}).items() if isinstance(value, float)}
        if measured:
            typer.echo(
                f"{name + ':':<9}" + "  ".join(f"{key} {value:.4f}" for key, value in measured.items())
            )
    typer.echo(f"model:   {run.model_folder}\ncurves:  {run.folder / 'curves.png'}")
    if isinstance(run.config, RewardModel):
        if (run.folder / "report.html").is_file():
            typer.echo(f"report:  {run.folder / 'report.html'}")
        typer.echo(f"next:    tuner eval {run.folder}, tuner score {run.folder} ROWS.jsonl")
    elif isinstance(run.config, PPO):
        typer.echo(
            f"next:    tuner chat {run.folder}, tuner eval {run.folder} --against {run.config.policy.path}"
        )
    else:
        typer.echo(f"next:    tuner chat {run.folder}")
