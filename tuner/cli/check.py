"""`tuner check`: a dry run of a config."""

from __future__ import annotations

from typing import Annotated

import typer


def check(
    config: Annotated[str, typer.Argument(help="Config file, or the name of one that comes with tuner.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the config: key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    tiny: Annotated[
        bool, typer.Option(help="A small model and example rows for what is not at hand.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Show the estimated peak memory of a device, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check config, data, template, steps and model shape without training."""
    from dataclasses import asdict
    from json import dumps

    from tuner.config import load_config, override
    from tuner.stages.check import check as check_config

    value = override(load_config(config), overrides or [])
    report = check_config(value, tiny=tiny)
    if json:
        typer.echo(dumps(asdict(report), ensure_ascii=False))
        return
    passes = "" if report.passes is None else f" in {report.passes:,} passes"
    lines = {
        "model": f"{report.family}, {report.parameters:,} weights, {report.trained:,} of them trained"
        if value.adapter is None  # type: ignore[attr-defined]
        else f"{report.family}, {report.parameters:,} weights, {report.trained:,} trained beside them",
        "rope": report.rope,
        "data": report.data,
        "plan": f"{report.steps:,} steps{passes}, {report.tokens:,} tokens, steps {report.fill:.1%} full",
    }
    if memory:
        lines["memory"] = f"about {report.peak_gib:.2f} GiB at the peak of one device, estimated by counting"
    if report.replaced:
        lines["tiny"] = f"something small stood in for {', '.join(report.replaced)}"
    for name, text in (*lines.items(), *(("but", warning) for warning in report.warnings)):
        typer.echo(f"{name + ':':<8} {text}")
    typer.echo("ready to train")
