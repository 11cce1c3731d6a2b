"""`tuner configs`: the configs shipped with tuner."""

import ast
from pathlib import Path
from typing import Annotated

import typer

from tuner.printable import echo, printable_json


def configs(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the configs shipped with tuner."""
    from tuner.display.table import print_table
    from tuner.resources import configs_folder

    summaries = [(file.stem, first_line(file)) for file in sorted(configs_folder().glob("*.py"))]
    if as_json:
        entries = [{"name": name, "about": summary} for name, summary in summaries]
        echo(printable_json(entries, indent=2))
        return
    print_table(("name", "about"), summaries)


def first_line(file: Path) -> str:
    """First line of a Python file's docstring, read without executing the file."""
    try:
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError):
        return "(not valid Python)"
    return (docstring or "").partition("\n")[0]
