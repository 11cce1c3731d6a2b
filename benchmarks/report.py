"""Reports of benchmarks: a table on stdout, and with --write also in benchmarks/results/NAME.md."""

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
    """Print the table; write: also save it, with machine, versions and command."""
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
    """The last column: whether a value is within its limit, a maximum or (least) a minimum."""
    return "yes" if (value >= limit if least else value <= limit) else "NO"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also readable as plain text: first column left-aligned, numbers right-aligned."""
    widths = [max(len(row[column]) for row in (columns, *rows)) for column in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1) + ":") if column else "-" * width for column, width in enumerate(widths)]
    return "\n".join([line(columns), line(rule), *map(line, rows)])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
