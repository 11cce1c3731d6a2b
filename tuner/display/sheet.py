"""Tables and style that report cards share, on a page and in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table

from tuner.display.panels import BLUE, GREEN, ORANGE
from tuner.display.rich_text import rich_text
from tuner.evaluation.report_card.tables import Table as PlainTable
from tuner.printable import safe

SHORT = 90
"""Characters of a text shown before it is folded."""


def cell_text(value: Any) -> str:
    """A value of a table as text; a dash for None."""
    if isinstance(value, float):
        return minus(f"{value:.3f}")
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def minus(figure: str) -> str:
    """With minus signs for hyphens."""
    return figure.replace("-", "−")


def terminal_table(table: PlainTable) -> Table:
    """A table for a rich console: text on the left of its column, numbers on the right."""
    names, rows = table
    shown = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(names), header_style="bold")
    for column in range(len(rows[0]) if rows else 0):
        is_text = any(isinstance(row[column], str) for row in rows)
        name, side = names[column] if names else "", "left" if is_text else "right"
        shown.add_column(rich_text(name), justify=side, overflow="fold", no_wrap=not is_text)
    for row in rows:
        shown.add_row(*(rich_text(cell_text(value)) for value in row))
    return shown


def one_line(text: str) -> RenderableType:
    """One line, as much of the text as fits."""
    line = rich_text(text.replace("\n", "⏎").replace("\t", " "))
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def html_table(name: str, table: PlainTable) -> str:
    """A table of class `name`; that of the reliability's many bins is folded."""
    names, rows = table
    head = ""
    for column, title in enumerate(names):
        kind = "" if any(isinstance(row[column], str) for row in rows) else "number"
        head += f"<th scope='col' class='{kind}'>{safe(title)}</th>"
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    html = f"<div class='wide'><table class='{name}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    if name != "reliability":
        return html
    return f"<details><summary>{len(rows):,} bins</summary>{html}</details>"


def _cell(value: Any) -> str:
    if not isinstance(value, str):
        return f"<td class='number'>{safe(cell_text(value))}</td>"
    if len(value) <= SHORT and "\n" not in value:
        return f"<td>{safe(value)}</td>"
    start = safe(value[:SHORT].replace("\n", " "))
    return f"<td><details><summary>{start}…</summary><pre>{safe(value)}</pre></details></td>"


STYLE = (
    f":root{{--a:{BLUE};--b:{ORANGE};--good:{GREEN}}}"
    + """
@media(prefers-color-scheme:dark){:root{--a:#56B4E9;--b:#E69F00}}
section p{white-space:pre-line;margin:0 0 8px;color:var(--soft);font-size:13.5px;max-width:76ch}
.verdict{border-radius:10px;padding:12px 18px;overflow-wrap:anywhere}
.verdict ul{margin:6px 0 0;padding-left:20px}
.failed{background:var(--redback);color:var(--red)}.remarks{background:var(--amberback);color:var(--amber)}
.good{background:var(--greenback);color:var(--green)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:14px;align-items:start}
figure{margin:0;padding:14px 16px}figcaption{font-weight:600;font-size:14px;margin-bottom:4px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
svg .a{fill:var(--a);stroke:var(--a)}svg .a.area{stroke:none;opacity:.72}
svg .a.thin{fill:none;stroke-width:1.5}svg .b.line{fill:none;stroke:var(--b);stroke-width:2}
svg .grid{stroke:var(--line)}svg .chance{stroke:var(--ink);stroke-width:1.4;stroke-dasharray:5 4}
svg .whisker{stroke:var(--ink);stroke-width:1.6}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:4px 18px 4px 0;text-align:left;vertical-align:top;overflow-wrap:break-word}
th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--line)}
.number{text-align:right;white-space:nowrap}
.worst{width:100%;min-width:860px;table-layout:fixed}.worst td{border-bottom:1px solid var(--line)}
.worst th:nth-child(-n+2){width:72px}.worst th:nth-child(3){width:104px}.worst th:nth-child(4){width:150px}
summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:12.5px/1.55 ui-monospace,Menlo,Consolas,monospace;
margin:6px 0;padding:8px;background:var(--card);border:1px solid var(--line);border-radius:6px}
"""
)
"""Rules of a report card's page, after those of `page_frame`."""
