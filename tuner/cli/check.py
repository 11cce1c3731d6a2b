"""`tuner check`: a dry run of a config."""

from __future__ import annotations

from typing import Annotated

import typer

from tuner.printable import echo, printable_json


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
    if not tiny:
        from tuner.stages.preflight import preflight

        preflight(run_config)
    from tuner.stages.check import check as check_config

    report = check_config(run_config, tiny=tiny)
    if json:
        echo(printable_json(asdict(report)))
        return
    passes = "" if report.passes is None else f" in {report.passes:,} passes"
    lines = {
        "model": f"{report.family}, {report.parameters:,} parameters; trained: {report.trained:,}",
        **report.coverage,
        "rope": report.rope,
        "data": report.data,
        "plan": f"{report.steps:,} steps{passes}, {report.tokens:,} tokens, steps {report.fill:.1%} full",
    }
    if memory or gpus is not None:
        lines["memory"] = f"peak of about {report.peak_gib:.2f} GiB per device (an estimate)"
    if report.replaced:
        lines["tiny"] = f"replaced by small stand-ins: {', '.join(report.replaced)}"
    remarks = [("note", note) for note in report.notes] + [("warning", text) for text in report.warnings]
    for name, text in (*lines.items(), *remarks):
        echo(f"{name + ':':<8} {text}")
    echo("ready to train")
