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
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Check config, data, template, steps and model shape without training."""
    from dataclasses import asdict
    from json import dumps

    from tuner.config import load_config, override
    from tuner.stages.checking import check as check_config

    value = override(load_config(config), overrides or [])
    found = check_config(value, tiny=tiny)
    if json:
        typer.echo(dumps(asdict(found), ensure_ascii=False))
        return
    passes = "" if found.passes is None else f" in {found.passes:,} passes"
    lines = {
        "model": f"{found.family}, {found.parameters:,} weights, {found.trained:,} of them trained"
        if value.adapter is None  # type: ignore[attr-defined]
        else f"{found.family}, {found.parameters:,} weights, {found.trained:,} trained beside them",
        "rope": found.rope,
        "data": found.data,
        "plan": f"{found.steps:,} steps{passes}, {found.tokens:,} tokens, steps {found.fill:.1%} full",
    }
    if memory:
        lines["memory"] = f"about {found.peak_gib:.2f} GiB at the peak of one device, estimated by counting"
    if found.replaced:
        lines["tiny"] = f"something small stood in for {', '.join(found.replaced)}"
    for name, text in (*lines.items(), *(("but", one) for one in found.warnings)):
        typer.echo(f"{name + ':':<8} {text}")
    typer.echo("ready to train")
