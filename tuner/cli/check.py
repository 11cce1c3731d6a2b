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
    card: Annotated[
        float | None,
        typer.Option(min=1, help="Memory of one GPU in GiB: also say whether it holds the peak."),
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
    of_memory = memory or gpus is not None or card is not None
    if not tiny:
        from tuner.stages.preflight import preflight

        try:
            preflight(run_config)
        except MissingError:
            if not of_memory:
                raise
    from tuner.stages.check import check as check_config

    report = check_config(run_config, tiny=tiny, shapes=of_memory, processes=gpus or 1, card_gib=card)
    if json:
        echo(printable_json(asdict(report)))
        return
    for name, text in _lines(report, of_memory, card):
        echo(f"{name + ':' if name else '':<8} {text}")
    if not report.unchecked:
        echo("ready to train")


def _lines(report: CheckReport, of_memory: bool, card: float | None) -> Iterator[tuple[str, str]]:
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
    for part, choice in report.chosen.items():
        yield "chosen", f"{part + ': ' if part else ''}{choice.sentence()}"
    if of_memory:
        yield from _memory_lines(report, card)
    for path, origin in report.shapes.items():
        yield "shape", f"{path}: {origin}"
    if report.replaced:
        yield "tiny", f"replaced by small stand-ins: {', '.join(report.replaced)}"
    yield from (("note", note) for note in report.notes)
    yield from (("warning", text) for text in report.warnings)
    if report.unchecked:
        yield "missing", f"{report.unchecked}; so only memory was estimated, and nothing else was checked"


def _memory_lines(report: CheckReport, card: float | None) -> Iterator[tuple[str, str]]:
    """The peak, what it is made of, the largest part first, what would save most, and which cards hold it."""
    from tuner.stages.memory_savings import RESERVE_GIB, smallest_card

    peak, plan = report.peak_gib, report.memory
    yield "memory", f"peak of about {peak:.2f} GiB per device, in {plan.moment} (an estimate)"
    for name, size in sorted(plan.terms.items(), key=lambda item: -item[1]):
        if size >= 0.005 * plan.peak:
            yield "", f"{size / 2**30:8.2f} GiB {size / plan.peak:4.0%}  {name}"
    best = report.savings[:3]
    if best:
        texts = [f"{saving.setting} {saving.saved_gib:.2f} GiB" for saving in best]
        yield "saves", f"each alone: {', '.join(texts)}"
    least = smallest_card(peak)
    yield (
        "card",
        f"{RESERVE_GIB:g} GiB more for CUDA itself; "
        + (f"{least} GiB hold it" if least else "no single card holds it: divide the model (parallel.shard)"),
    )
    if card is None:
        return
    room = card - RESERVE_GIB - peak
    if room >= 0:
        yield "card", f"{card:g} GiB: it fits, with {room:.2f} GiB to spare"
        return
    enough = [saving.setting for saving in report.savings if saving.saved_gib >= -room]
    remedy = f"; enough would be {' or '.join(enough)}" if enough else "; no single setting is enough"
    yield "card", f"{card:g} GiB: {-room:.2f} GiB too little{remedy}"
