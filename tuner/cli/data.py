"""`tuner data`: the tokens a config trains on, and errors in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.printable import echo, printable_json


def data(
    config: Annotated[
        str, typer.Argument(help="Config file, or name of a shipped config (see `tuner configs`).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Config overrides, such as optimizer.lr=1e-4.", metavar="[KEY=VALUE]..."),
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Number of packed rows of the first step to show.")] = 1,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page instead.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print counts, errors and notices as JSON.")] = False,
) -> None:
    """Show the tokens the loss is taken on, packing, statistics, and errors. Exits with 1 if there are errors."""
    from tuner.config import load_config, override
    from tuner.stages.preflight import preflight

    run_config = override(load_config(config), overrides or [])
    preflight(run_config)
    from rich.console import Console

    from tuner.cli.output import write_file
    from tuner.data import inspection
    from tuner.display.data_terminal import data_terminal
    from tuner.stages.data_view import load_data_view

    view = load_data_view(run_config, passes)
    preview, report = view.preview, view.rows.report
    errors = inspection.errors(preview.examples, view.tokenizer, report)
    if json:
        notices = inspection.notices(preview.examples, view.tokenizer, report)
        counts = {"errors": errors, "notices": notices, "fingerprint": view.rows.fingerprint}
        echo(printable_json(report.to_dict() | counts))
    elif html is not None:
        write_file(html, view.html())
        echo(f"page written, to open in a browser: {html}")
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
                tokens_per_pass=view.tokens_per_pass,
            )
        )
    if errors:
        raise typer.Exit(1)
