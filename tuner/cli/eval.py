"""`tuner eval`: evaluation of a run's model on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.trust import Trust
from tuner.errors import UserError
from tuner.printable import echo, printable_json


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, or one of its checkpoints.")],
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--files", help="Rows to evaluate on instead of the run's own test rows; may be repeated."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Policy runs only: another policy (run, model folder or hub name) to compute win rates against; "
            "may be repeated."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write an HTML page (reward models and policy runs).")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks to measure the model on, separated by commas: needle, multikey and trace ask for facts in long "
            "prompts."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Context tasks: lengths of prompts in tokens, separated by commas; by default up to the model's own."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    trust: Trust = False,
) -> None:
    """Evaluate a run's model on its test rows, or on other rows.

    Language models: loss and score. Reward models: the report card. Policy runs: reward and gold score of the answers
    to the test prompts, and win rates against other policies, each prompted in its own chat template. With --tasks:
    accuracy on tasks over long prompts, by length and depth.
    """
    from rich.console import Console

    from tuner.cli.output import write_file

    if tasks is None:
        from tuner.stages.evaluate_run import evaluate_run

        if lengths is not None:
            raise UserError(
                "--lengths are those of context tasks; write --tasks needle beside it, or leave it out"
            )
        evaluation = evaluate_run(run, tuple(files or ()), against or (), page=html is not None, trust=trust)
    else:
        from tuner.stages.evaluate_context import evaluate_context

        for name, value in (("--files", files), ("--against", against), ("--html", html)):
            if value:
                raise UserError(f"{name} is not for --tasks, which have rows of their own; leave it out")
        evaluation = evaluate_context(run, tasks.split(","), _numbers(lengths), trust=trust)
    if html is not None and evaluation.page is not None:
        write_file(html, evaluation.page())
    if json:
        echo(printable_json(evaluation.results))
    elif evaluation.terminal is not None:
        Console().print(evaluation.terminal)
    else:
        figures = (f"{name} {value:.4f}" for name, value in evaluation.results.items() if value is not None)
        echo("  ".join(figures))


def _numbers(lengths: str | None) -> list[int]:
    numbers = [] if lengths is None else lengths.split(",")
    if not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f"--lengths {lengths}: write numbers of tokens, as in --lengths 512,4096")
    return [int(number) for number in numbers]
