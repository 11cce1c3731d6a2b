"""How every benchmark reports: a table on stdout, and with --write the same in benchmarks/results/NAME.md."""

import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def report(
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    notes: Sequence[str] = (),
    packages: Sequence[str] = ("torch", "transformers", "trl"),
    write: bool,
) -> None:
    """Print the table, and write it with what it was measured on."""
    table = _table(columns, rows)
    print(f"{title}\n\n{table}", flush=True)
    for note in notes:
        print(f"\n{note}", flush=True)
    if not write:
        return
    RESULTS.mkdir(exist_ok=True)
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    lines = (
        f"# {title}",
        table,
        *notes,
        f"{datetime.date.today()} · {_processor()}, {os.cpu_count()} cores, one thread · "
        f"python {platform.python_version()}, {versions}",
        f"    python benchmarks/{' '.join([name + '.py', *sys.argv[1:]])}",
    )
    file = RESULTS / f"{name}.md"
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nwritten to {file}")


def verdict(value: float, limit: float, *, least: bool = False) -> str:
    """The last column: whether a figure that may be at most (or must be at least) its limit is within it."""
    return "yes" if (value >= limit if least else value <= limit) else "NO"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well as it stands: the first column to the left, numbers to the right."""
    widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1) + ":") if place else "-" * width for place, width in enumerate(widths)]
    return "\n".join([line(columns), line(rule), *map(line, rows)])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
