"""`tuner eval`: evaluation of a run's model on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.trust import Trust
from tuner.printable import echo, printable_json


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(help="Run folder, or one of its checkpoints; with --tasks also a model or hub name."),
    ],
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--files", help="Rows to evaluate on instead of the run's own test rows; may be repeated."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Policy runs, or --tasks: another policy (run, model folder or hub name) to compare with; "
            "may be repeated."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write an HTML page (reward models, policy runs, --tasks).")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks to measure the model on, before and after its training, separated by commas: a JSONL file of "
            "your rows, or names of lm-evaluation-harness (gsm8k, ifeval, mmlu)."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="--tasks: rows of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="--tasks: solved examples before each question.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="--tasks: maximum length of an answer to a row of a file, in tokens.")
    ] = 512,
    alone: Annotated[
        bool, typer.Option("--alone", help="--tasks: leave out the models that the run was trained from.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="--tasks: prompts without a chat template.")] = False,
    interpreter: Annotated[
        bool,
        typer.Option(
            "--interpreter",
            help="--tasks: run the Python blocks that models write in answers to rows of a file, with limits on "
            "time, memory and files.",
        ),
    ] = False,
    harness_rules: Annotated[
        bool,
        typer.Option(
            "--harness-rules",
            help="--tasks: split context and continuation as lm-evaluation-harness does, to compare with its figures.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    trust: Trust = False,
) -> None:
    """Evaluate a run's model on its test rows, or on other rows.

    Language models: loss and score. Reward models: the report card. Policy runs: reward and gold score of the answers
    to the test prompts, and win rates against other policies, each prompted in its own chat template. With --tasks: one
    table of figures on tasks, of the run and of the models it was trained from.
    """
    from rich.console import Console

    from tuner.cli.output import write_file

    if tasks is None:
        from tuner.stages.evaluate_run import evaluate_run

        evaluation = evaluate_run(run, tuple(files or ()), against or (), page=html is not None, trust=trust)
    else:
        from tuner.stages.evaluate_tasks import TaskOptions, evaluate_tasks

        options = TaskOptions(limit, max_new_tokens, shots, plain, harness_rules, interpreter, alone)
        evaluation = evaluate_tasks(str(run), tasks.split(","), against or (), options, trust=trust)
    if html is not None and evaluation.page is not None:
        write_file(html, evaluation.page())
    if json:
        echo(printable_json(evaluation.results))
    elif evaluation.terminal is not None:
        Console().print(evaluation.terminal)
    else:
        figures = (f"{name} {value:.4f}" for name, value in evaluation.results.items() if value is not None)
        echo("  ".join(figures))
