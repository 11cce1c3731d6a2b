"""`tuner eval`: what a run's model is worth on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    files: Annotated[
        list[str] | None,
        typer.Option("--files", help="Rows to measure on instead of the run's own test rows."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a PPO run: a run, model folder or hub name whose answers are compared; may be repeated."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the card of a reward model or PPO run to this page, too.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a run's model on its test rows again, or on others.

    SFT: loss and score. Reward model: its report card. PPO: what reward model and rule say of its answers to the test
    prompts, and how often it wins against other policies, each asked in its own chat template.
    """
    from json import dumps

    from rich.console import Console

    from tuner.errors import UserError
    from tuner.stages.evaluate_run import evaluate_run

    evaluation = evaluate_run(run, tuple(files or ()), against or (), page=html is not None)
    if html is not None and evaluation.page is not None:
        try:
            html.write_text(evaluation.page(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{html}: cannot be written ({error.strerror}); choose another place") from error
    if json:
        typer.echo(dumps(evaluation.results, ensure_ascii=False))
    elif evaluation.terminal is not None:
        Console().print(evaluation.terminal)
    else:
        figures = (f"{name} {value:.4f}" for name, value in evaluation.results.items() if value is not None)
        Console().print("  ".join(figures))
