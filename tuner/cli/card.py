"""`tuner card`: the model card of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.printable import echo


def card(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Markdown file to write; default: standard output.")
    ] = None,
) -> None:
    """Write the model card of a run: base, data, figures, config, licenses, and how to load it. Uses no network."""
    from tuner.cli.output import write_file
    from tuner.stages.model_card import model_card

    text = model_card(run)
    if output is None:
        echo(text, end="")
    else:
        write_file(output, text)
