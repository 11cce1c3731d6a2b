"""`tuner import`: a config of another trainer as one of tuner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.output import write_file
from tuner.errors import UserError
from tuner.printable import echo, printable_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tuner.importers.import_file import Imported


def import_config(
    file: Annotated[
        str,
        typer.Argument(help="Config of XTuner 0.2 (.py), LLaMA-Factory or Axolotl (.yaml).", metavar="FILE"),
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Config to write; default: STEM.py, for Python STEM_tuner.py."),
    ] = None,
    devices: Annotated[
        int,
        typer.Option(min=1, help="Devices that FILE was trained on, which its batch size is multiplied by."),
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Turn a config of XTuner 0.2, LLaMA-Factory or Axolotl into one of tuner, and say what could not be carried.

    FILE is read as syntax: nothing in it is executed.
    """
    from tuner.importers.import_file import import_config as read

    source = Path(file)
    target = _target(source, output)
    imported = read(source, target, devices)
    files = {target: imported.text, **{Path(name): text for name, text in imported.templates.items()}}
    for path in files:
        if path.exists():
            raise UserError(
                f"{path} exists already and is not overwritten: name another by --output, or remove it"
            )
    for path, text in files.items():
        write_file(path, text)
    if as_json:
        _print_json(imported, [str(path) for path in files])
    else:
        _print(imported, source, [str(path) for path in files])


def _target(source: Path, output: str | None) -> Path:
    if output is None:
        stem = source.stem + ("_tuner" if source.suffix == ".py" else "")
        return Path(f"{stem.lstrip('._-') or 'imported'}.py")
    path = Path(output)
    if path.is_dir() or output.endswith("/"):
        raise UserError(f"--output {output}: is a folder; name a file")
    return path if path.suffix == ".py" else path.with_name(f"{path.name}.py")


def _print(imported: Imported, source: Path, written: list[str]) -> None:
    report = imported.report
    echo(f"{source}: {imported.tool}, {type(imported.config).__name__}; {len(report.carried)} keys carried")
    _print_part("decided, with a comment in the file:", report.decided)
    _print_part("could not be carried:", report.lost)
    if report.idle:
        echo("need no counterpart:")
        keys_by_reason: dict[str, list[str]] = {}
        for key, why in report.idle.items():
            keys_by_reason.setdefault(why, []).append(key)
        for why, keys in keys_by_reason.items():
            echo(f"  {', '.join(keys)}: {why}")
    echo(f"written: {', '.join(written)}; next: tuner check {written[0]} --tiny")


def _print_part(title: str, entries: Mapping[str, str]) -> None:
    if entries:
        echo(title)
    for key, why in entries.items():
        echo(f"  {key}: {why}")


def _print_json(imported: Imported, written: list[str]) -> None:
    report = imported.report
    values = {
        "tool": imported.tool,
        "stage": imported.config.model_dump()["stage"],
        "carried": sorted(report.carried),
        "decided": report.decided,
        "lost": report.lost,
        "idle": report.idle,
        "written": written,
    }
    echo(printable_json(values, indent=2))
