"""The option `--trust` of the commands that read run and model folders."""

from typing import Annotated

import typer

Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run the Python code that the run or model names or brings along; nothing of it runs without.",
    ),
]
