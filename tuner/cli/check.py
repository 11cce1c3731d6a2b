"""`tuner check`: a dry run of a config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.errors import MissingError
from tuner.printable import echo, printable_json

if TYPE_CHECKING:  # imports torch
    from tuner.stages.check import CheckReport


def check(
    config: Annotated[
        str, typer.Argument(help="Config file, or name of a shipped config (see `tuner configs`).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Config overrides, such as optimizer.lr=1e-4.", metavar="[KEY=VALUE]..."),
    ] = None,
    tiny: Annotated[
        bool, typer.Option(help="Replace missing models and data by a small model and example rows.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Also estimate the peak memory per device.")] = False,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="The same in a run of this many GPUs, whose layout (parallel) is checked."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Dry run: check config, data, chat template and model without training, and count the steps."""
    from dataclasses import asdict

    from tuner.config import load_config, override

    run_config = override(load_config(config), overrides or [])
    if gpus is not None:
        from tuner.stages.preflight import refuse_layout

        refuse_layout(run_config, gpus)
    of_memory = memory or gpus is not None
    if not tiny:
        from tuner.stages.preflight import preflight

        try:
            preflight(run_config)
        except MissingError:
            if not of_memory:
                raise
    from tuner.stages.check import check as check_config

    report = check_config(run_config, tiny=tiny, shapes=of_memory)
    if json:
        echo(printable_json(asdict(report)))
        return
    for name, text in _lines(report, of_memory):
        echo(f"{name + ':':<8} {text}")
    if not report.unchecked:
        echo("ready to train")


def _lines(report: CheckReport, of_memory: bool) -> Iterator[tuple[str, str]]:
    """The report in words: the name of a line, and its text."""
    yield "model", f"{report.family}, {report.parameters:,} parameters; trained: {report.trained:,}"
    yield from report.coverage.items()
    if not report.unchecked:
        passes = "" if report.passes is None else f" in {report.passes:,} passes"
        yield "rope", report.rope
        yield "data", report.data
        yield (
            "plan",
            f"{report.steps:,} steps{passes}, {report.tokens:,} tokens, steps {report.fill:.1%} full",
        )
    if of_memory:
        yield "memory", f"peak of about {report.peak_gib:.2f} GiB per device (an estimate)"
    for path, origin in report.shapes.items():
        yield "shape", f"{path}: {origin}"
    if report.replaced:
        yield "tiny", f"replaced by small stand-ins: {', '.join(report.replaced)}"
    yield from (("note", note) for note in report.notes)
    yield from (("warning", text) for text in report.warnings)
    if report.unchecked:
        yield "missing", f"{report.unchecked}; so only memory was estimated, and nothing else was checked"
