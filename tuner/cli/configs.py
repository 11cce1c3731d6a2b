"""`tuner configs`: the named configs that come with tuner."""

import ast
from pathlib import Path
from typing import Annotated

import typer


def configs(as_json: Annotated[bool, typer.Option("--json", help="The same for scripts.")] = False) -> None:
    """The configs that come with tuner, by name."""
    from tuner.display.table import print_table
    from tuner.resources import configs_folder

    found = [(file.stem, first_line(file)) for file in sorted(configs_folder().glob("*.py"))]
    if as_json:
        import json

        listed = [{"name": name, "about": about} for name, about in found]
        typer.echo(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    print_table(("name", "what it does"), found)


def first_line(file: Path) -> str:
    """First line of a Python file's docstring, read without running the file."""
    try:
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError):
        return "(not valid Python)"
    return (text or "").partition("\n")[0]
