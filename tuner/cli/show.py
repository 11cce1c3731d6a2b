"""`tuner show`: every field of a config with its value, origin and meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tuner.printable import echo, printable_json

if TYPE_CHECKING:
    from tuner.config import StageConfig
    from tuner.config.config_table import Row

STYLES_BY_ORIGIN = {"default": "dim", "config": "", "override": "bold magenta"}


def show(
    config: Annotated[
        str, typer.Argument(help="Config file, or name of a shipped config (see `tuner configs`).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Config overrides, such as optimizer.lr=1e-4."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show every field of a config: its value, where the value comes from, and what it means."""
    from tuner.config import load_config, override
    from tuner.config.config_table import table
    from tuner.display.table import print_table

    loaded = override(load_config(config), overrides or [])
    rows = table(loaded, [text.partition("=")[0] for text in overrides or []])
    if as_json:
        _print_json(loaded, rows)
        return
    print_table(
        ("field", "value", "from", "meaning"),
        [(row.path, row.text, row.origin, row.meaning) for row in rows],
        [STYLES_BY_ORIGIN[row.origin] for row in rows],
    )


def _print_json(config: StageConfig, rows: list[Row]) -> None:
    from tuner.config.serialization import json_value

    leaves = [
        {"path": row.path, "value": json_value(row.value), "origin": row.origin, "meaning": row.meaning}
        for row in rows
    ]
    echo(printable_json({"config": json_value(config), "leaves": leaves}, indent=2))
