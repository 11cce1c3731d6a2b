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
    from tuner.data import inspection
    from tuner.display.data_terminal import data_terminal
    from tuner.errors import UserError
    from tuner.stages.data_view import load_data_view

    view = load_data_view(override(load_config(config), overrides or []), passes)
    preview, report = view.preview, view.rows.report
    errors = inspection.errors(preview.examples, view.tokenizer, report)
    if json:
        notices = inspection.notices(preview.examples, view.tokenizer, report)
        counts = {"errors": errors, "notices": notices, "fingerprint": view.rows.fingerprint}
        typer.echo(dumps(report.to_dict() | counts, ensure_ascii=False))
    elif html is not None:
        try:
            html.write_text(view.html(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{html}: cannot be written ({error.strerror}); choose another place") from error
        typer.echo(f"{html}: open it in a browser")
    else:
        console = Console()
        console.print(
            data_terminal(
                preview.examples,
                view.tokenizer,
                preview.groups,
                report,
                color=console.is_terminal,
                label=preview.label,
            )
        )
    if errors:
        raise typer.Exit(1)
