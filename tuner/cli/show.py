"""`tuner show`: every value of a config, where it comes from, and what it means."""

from typing import Annotated

import typer

STYLES = {"default": "dim", "config": "", "override": "bold magenta"}


def show(
    config: Annotated[str, typer.Argument(help="A config file, or a name from `tuner configs`.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as in optimizer.lr=1e-4.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same for scripts.")] = False,
) -> None:
    """Every value of a config: where it comes from, and what it means."""
    from tuner.config import load_config, override
    from tuner.config.config_table import table
    from tuner.display.table import print_table

    loaded = override(load_config(config), changes or [])
    rows = table(loaded, [change.partition("=")[0] for change in changes or []])
    if as_json:
        _print_json(loaded, rows)
        return
    print_table(
        ("field", "value", "from", "meaning"),
        [(row.path, row.text, row.origin, row.meaning) for row in rows],
        [STYLES[row.origin] for row in rows],
    )


def _print_json(config: object, rows: list) -> None:
    import json

    from tuner.config.serialization import json_value

    leaves = [
        {"path": row.path, "value": json_value(row.value), "origin": row.origin, "meaning": row.meaning}
        for row in rows
    ]
    typer.echo(json.dumps({"config": json_value(config), "leaves": leaves}, indent=2, ensure_ascii=False))
