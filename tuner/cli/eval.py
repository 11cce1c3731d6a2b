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
    html: Annotated[Path | None, typer.Option(help="Write the report card to this page, too.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a run's model on its test rows again, or on others: a report card, or loss and score."""
    from json import dumps

    from rich.console import Console

    from tuner.errors import UserError
    from tuner.stages.evaluating import evaluate_run

    found = evaluate_run(run, tuple(files or ()))
    if html is not None:
        try:
            html.write_text(found.page(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{html}: cannot be written ({error.strerror}); choose another place") from error
    if json:
        typer.echo(dumps(found.results, ensure_ascii=False))
    else:
        Console().print(found.shown())
