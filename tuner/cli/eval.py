"""`tuner eval`: evaluation of a run's model on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.task_options import (
    Alone,
    HarnessRules,
    Interpreter,
    Lengths,
    Limit,
    MaxNewTokens,
    OpenCompass,
    Plain,
    Shots,
    Tasks,
)
from tuner.cli.trust import Trust
from tuner.errors import UserError
from tuner.evaluation.context_tasks import TASKS as CONTEXT_TASKS
from tuner.printable import echo, printable_json

if TYPE_CHECKING:
    from tuner.stages.stage import Evaluation


def evaluate(
    run: Annotated[
        str,
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
    tasks: Tasks = None,
    lengths: Lengths = None,
    opencompass: OpenCompass = None,
    limit: Limit = None,
    shots: Shots = None,
    max_new_tokens: MaxNewTokens = None,
    alone: Alone = False,
    plain: Plain = False,
    interpreter: Interpreter = False,
    harness_rules: HarnessRules = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    trust: Trust = False,
) -> None:
    """Evaluate a run's model on its test rows, or on other rows.

    Language models: loss and score. Reward models: the report card. Policy runs: reward and gold score of the answers
    to the test prompts, and win rates against other policies, each prompted in its own chat template. With --tasks: one
    table of figures on tasks, of the run and of the models it was trained from.
    """
    from tuner.cli.output import write_file

    options: dict[str, object] = {
        "--limit": limit,
        "--shots": shots,
        "--max-new-tokens": max_new_tokens,
        "--alone": alone,
        "--plain": plain,
        "--interpreter": interpreter,
        "--harness-rules": harness_rules,
        "--opencompass": opencompass,
    }
    _refuse_unused(tasks, files, options | {"--lengths": lengths})
    names = [] if tasks is None else [name.strip() for name in tasks.split(",")]
    if opencompass is not None:
        from tuner.stages.opencompass import opencompass_config

        write_file(opencompass, opencompass_config(run, names, against or (), alone=alone, trust=trust))
        return
    if tasks is None:
        from tuner.stages.evaluate_run import evaluate_run

        evaluation = evaluate_run(
            Path(run), tuple(files or ()), against or (), page=html is not None, trust=trust
        )
    elif lengths is not None or set(names) & CONTEXT_TASKS.keys():
        from tuner.stages.evaluate_context import evaluate_context

        _refuse_beside_context({"--against": against, "--html": html} | options)
        evaluation = evaluate_context(run, names, _numbers(lengths), trust=trust)
    else:
        from tuner.stages.evaluate_tasks import MAX_NEW_TOKENS, TaskOptions, evaluate_tasks

        length = max_new_tokens or MAX_NEW_TOKENS
        settings = TaskOptions(limit, length, shots, plain, harness_rules, interpreter, alone)
        evaluation = evaluate_tasks(run, names, against or (), settings, trust=trust)
    if html is not None and evaluation.page is not None:
        write_file(html, evaluation.page())
    _show(evaluation, json)


def _show(evaluation: Evaluation, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
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


def _refuse_unused(tasks: str | None, files: list[str] | None, of_tasks: dict[str, object]) -> None:
    """UserError for options of the other kind of evaluation, which would do nothing."""
    unused = _given(of_tasks)
    if tasks is None and unused:
        raise UserError(f"{unused[0]}: this option is for --tasks; add it, or leave the option out")
    if tasks is not None and files:
        raise UserError(
            "--files: rows of the run's own evaluation; name the file of a task's rows with --tasks"
        )


def _refuse_beside_context(options: dict[str, object]) -> None:
    """UserError for options of other tasks."""
    if unused := _given(options):
        raise UserError(f"{unused[0]}: {', '.join(CONTEXT_TASKS)} have only --lengths; leave the option out")


def _given(options: dict[str, object]) -> list[str]:
    # 0 is a number of shots
    return [name for name, value in options.items() if value not in (None, []) and value is not False]
