"""Tables on stdout: drawn by rich on a terminal, aligned plain lines where there is none."""

import sys
from collections.abc import Mapping, Sequence

from tuner.display.rich_text import rich_text
from tuner.printable import echo, printable

GAP = "  "


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] | None = None
) -> None:
    """Print rows of texts under their heads; `styles` are rich styles, one for each row.

    Without a terminal no row is wrapped or cut, so that grep and awk find what they look for.
    """
    rows = [[printable(text) for text in row] for row in rows]  # before their widths are measured
    # rich assumes 80 columns for a pipe, and would fold long values there.
    if sys.stdout.isatty():
        _draw(head, rows, styles or [""] * len(rows))
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        echo(GAP.join(cells).rstrip())


def print_measures(lines: Mapping[str, Mapping[str, float | None]]) -> None:
    """Print measures by name, of several times or rounds, by label: without a terminal a line for each label.

    None and labels without measures are left out.
    """
    texts = {
        label: {name: f"{value:.4f}" for name, value in measures.items() if value is not None}
        for label, measures in lines.items()
    }
    texts = {label: measures for label, measures in texts.items() if measures}
    if len(texts) > 1 and sys.stdout.isatty():
        names = list(dict.fromkeys(name for measures in texts.values() for name in measures))
        rows = [[label, *(measures.get(name, "–") for name in names)] for label, measures in texts.items()]
        _draw(["", *names], rows, [""] * len(rows))
        return
    for label, measures in texts.items():
        echo(f"{label + ':':<9}" + GAP.join(f"{name} {text}" for name, text in measures.items()))


def _draw(head: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(rich_text(name), overflow="fold", no_wrap=place == 0)
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*(rich_text(text) for text in row), style=style)
    Console().print(table)
