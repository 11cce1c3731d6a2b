"""`tuner data`: the tokens a config learns from, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def data(
    config: Annotated[str, typer.Argument(help="Config file, or the name of one that comes with tuner.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the config: key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Packed rows of the first step to show.")] = 1,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page instead.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print counts and findings as JSON.")] = False,
) -> None:
    """Show the tokens the loss is taken on, how rows are packed, statistics, and errors (then exit code 1)."""
    from json import dumps

    from rich.console import Console

    from tuner.config import load_config, override
    from tuner.data.inspection import errors, notices
    from tuner.display.data_terminal import data_terminal
    from tuner.errors import UserError
    from tuner.models.load import load_tokenizer
    from tuner.stages.rows import load_rows, model_of, shown_passes, view_data

    value = override(load_config(config), overrides or [])
    tokenizer = load_tokenizer(model_of(value))
    rows = load_rows(value, tokenizer)
    report = rows.report
    examples, shown, label = shown_passes(value, rows, passes)
    wrong = errors(examples, tokenizer, report)
    if json:
        found = {"errors": wrong, "notices": notices(examples, tokenizer, report)}
        typer.echo(dumps(report.to_dict() | found | {"fingerprint": rows.fingerprint}, ensure_ascii=False))
    elif html is not None:
        try:
            html.write_text(view_data(value, passes).html, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{html}: cannot be written ({error.strerror}); choose another place") from error
        typer.echo(f"{html}: open it in a browser")
    else:
        console = Console()
        console.print(
            data_terminal(examples, tokenizer, shown, report, color=console.is_terminal, label=label)
        )
    if wrong:
        raise typer.Exit(1)
