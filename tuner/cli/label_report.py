"""What `tuner label` writes of labels: the report, and the rows of preferences."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.printable import echo, printable_json

if TYPE_CHECKING:
    from tuner.feedback.round_folders import LabelFiles

_COLUMNS = {
    "labels": "labels",
    "left": "left",
    "self_agreement": "self",
    "gold_accuracy": "planted",
    "ties": "ties",
    "unsure": "unsure",
    "skips": "skips",
    "median_seconds": "seconds",
}
"""Figures that the table shows, and their headings."""


def export(label_sets: Sequence[LabelFiles], output: Path) -> None:
    """Write the rows of preferences of all rounds, and say to stderr what was left out."""
    from tuner.cli.output import write_file
    from tuner.errors import UserError
    from tuner.feedback.preferences import preference_rows

    read = [path for files in label_sets for path in (files.candidates, files.store)]
    if output.exists() and any(path.exists() and output.samefile(path) for path in read):
        raise UserError(f"--export {output}: this file is read here; name another one")
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for files in label_sets:
        candidates, labels = files.read()
        own, reasons = preference_rows(labels, candidates)
        # ids are a round's own
        rows += own if files.round is None else [{"round": files.round, **row} for row in own]
        left_out += reasons
    write_file(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    echo(f"{len(rows):,} preferences: {output}" + (f"; left out: {reasons}" if reasons else ""), sys.stderr)


def report(label_sets: Sequence[LabelFiles], by_round: bool, as_json: bool) -> None:
    """Print the figures of a file or of a round, or by round those of a run."""
    figures = [files.figures() for files in label_sets]
    if as_json:
        echo(printable_json({"rounds": figures} if by_round else figures[0]))
        return
    for values in figures:
        if by_round:
            echo(f"round {values['round']}")
        _print_report(values)


def _print_report(figures: Mapping[str, Any]) -> None:
    """The figures as a table and lines for the terminal."""
    from tuner.display.table import print_table

    rows = [
        [group["condition"] or "all", group["annotator"] or "all", *(_cell(group[key]) for key in _COLUMNS)]
        for group in figures["groups"]
    ]
    print_table(["condition", "annotator", *_COLUMNS.values()], rows)
    for group in figures["groups"]:
        if group["alpha"] is not None:
            low, high = (_cell(group[key]) for key in ("alpha_low", "alpha_high"))
            pairs = f"{group['overlapping']:,} pairs"
            echo(f"alpha{_of(group)}: {group['alpha']:.2f} (95% interval {low} to {high}, {pairs})")
    for pair in figures["pairs"]:
        if pair["kappa"] is not None:
            both = " and ".join(pair["annotators"])
            echo(f"kappa of {both}{_of(pair)}: {pair['kappa']:.2f} ({pair['items']:,} pairs)")
    counts = {"preferences": figures["preferences"], **figures["left_out"]}
    parts = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    echo(f"{figures['candidates']:,} candidates: {parts}")


def _of(values: Mapping[str, Any]) -> str:
    return "" if values["condition"] is None else f" under {values['condition']}"


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
