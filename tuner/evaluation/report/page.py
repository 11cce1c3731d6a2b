"""A report card for people: in the terminal, and as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuner.evaluation.report import plots
from tuner.evaluation.report.card import SAME_LENGTH, ReportCard
from tuner.evaluation.report.tables import Table as PlainTable
from tuner.evaluation.report.tables import length_parts, tables
from tuner.printable import printable
from tuner.training.curves import BLUE, GREEN, ORANGE

WORST_IN_TERMINAL = 5
MOST_BARS = 30
SHORT = 90
"""Characters of a text shown before it is folded."""

TITLES = {
    "controls": "Controls",
    "conditions": "Conditions",
    "conditions_by_control": "Accuracy of each condition under the controls",
    "sources": "Sources",
    "reliability": "Reliability",
    "length": "Length",
    "position": "Position and truncation",
    "scores": "Scores",
    "worst": "Worst pairs",
}
"""Tables shown, in this order. The histogram is only drawn."""

OVER = {
    "twins": "Over the rows with a twin: the same two answers under conditions that prefer opposite ones. Without "
    "a condition exactly half of them are right, and no twins both.",
    "conditions": "Over the rows that name a condition; none has a twin.",
    "all": "Over all rows: none names a condition.",
}
CONTROLS = {
    "seen": "the condition named by the row, in wordings of the training",
    "unseen": "wordings never trained, with the known key word",
    "novel": "wordings that share no word with trained ones",
    "blank": "no condition",
    "swapped": "another condition's wording",
}


def terminal(card: ReportCard) -> RenderableType:
    """The card for a rich console: verdict, figures, tables, and the first of the worst pairs.

    Nothing is said by colour alone, and without a terminal it reads as plain lines.
    """
    shown: list[RenderableType] = [
        Text(
            _heading(card),
            style="bold red" if card.failed else "bold yellow" if card.verdict else "bold green",
        )
    ]
    shown += [Text(f"- {printable(one)}") for one in card.verdict]
    shown += [Text(), _terminal_table(([], [[name, value] for value, name in _figures(card)]))]
    for name, title, note, table in _parts(card):
        shown += [Text(f"\n{title}", style="bold")] + ([Text(printable(note), style="dim")] if note else [])
        if name == "worst":
            shown += _terminal_worst(card)
        else:
            shown.append(_terminal_table(_of_all(table) if name == "reliability" else table))
    return Group(*shown)


def html(card: ReportCard, title: str) -> str:
    """The card as one HTML page; light and dark as the reader's system is."""
    verdict = "".join(f"<li>{_safe(one)}</li>" for one in card.verdict)
    figures = "".join(
        f"<div><b>{_safe(value)}</b><span>{_safe(name)}</span></div>" for value, name in _figures(card)
    )
    sections = "".join(
        f"<section><h2>{_safe(title)}</h2>{f'<p>{_safe(note)}</p>' if note else ''}{_html_table(name, table)}</section>"
        for name, title, note, table in _parts(card)
    )
    return _PAGE.format(
        title=_safe(title),
        style=_STYLE,
        kind="failed" if card.failed else "remarks" if card.verdict else "good",
        heading=_safe(_heading(card)),
        verdict=f"<ul>{verdict}</ul>" if verdict else "",
        figures=figures,
        plots="".join(_plots(card)),
        sections=sections,
    )


def _heading(card: ReportCard) -> str:
    if card.failed:
        return "This reward model fails:"
    return "Nothing fails, but mind:" if card.verdict else "Nothing wrong was found."


def _figures(card: ReportCard) -> list[tuple[str, str]]:
    """(value, name) of what to read first."""
    if card.overall is None:
        return []
    right, said = card.overall.accuracy, []
    said.append((f"{right.value:.3f}", f"accuracy ({right.low:.3f} to {right.high:.3f})"))
    seen = card.controls.rows[0] if card.controls else None
    if seen is not None and seen.twins is not None:
        said.append((f"{seen.twins:.3f}", "twins both right"))
    if card.length is not None:
        said.append((f"{card.length.longer_wins.value:.3f}", "if the longer answer won"))
        if card.length.spearman is not None:
            said.append((_minus(f"{card.length.spearman:+.2f}"), "rank correlation with length"))
    said += [
        (f"{card.overall.calibration.ece:.3f}", "calibration error"),
        (_minus(f"{card.overall.margin:.2f}"), "mean margin"),
    ]
    if card.scores is not None and card.scores.outside is not None:
        said.append((f"{card.scores.outside:.1%}", f"scores outside ±{card.scores.bound:g}"))
    pairs = [(f"{right.pairs:,}", "pairs")] if right.pairs != right.rows else []
    return [*said, (f"{right.rows:,}", "rows"), *pairs]


def _parts(card: ReportCard) -> Iterator[tuple[str, str, str, PlainTable]]:
    """(name, title, note, table) of every table shown."""
    made, notes = tables(card), _notes(card)
    for name, title in TITLES.items():
        if name in made:
            yield name, title, notes.get(name, ""), made[name]


def _notes(card: ReportCard) -> dict[str, str]:
    notes = {
        "reliability": "Confidence is the larger of P and 1 − P, with P = sigmoid(better − worse).",
        "length": f"Pairs within {SAME_LENGTH:.0%} show what is left when length cannot help.",
        "scores": "Mean, standard deviation and quantiles.",
    }
    if card.controls is not None:
        rows = [f"{one.name}: {CONTROLS[one.name]}" for one in card.controls.rows]
        notes["controls"] = "\n".join([OVER[card.controls.over], *rows])
    if card.length is not None and card.length.pearson is not None and card.length.spearman is not None:
        notes["length"] += (
            f"\nCorrelation of score and length: {card.length.pearson:+.3f} (Pearson), "
            f"{card.length.spearman:+.3f} (Spearman)."
        )
    return notes


def _of_all(table: PlainTable) -> PlainTable:
    """The reliability of all pairs, without that of each condition."""
    return table[0][1:], [row[1:] for row in table[1] if row[0] == "all"]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return _minus(f"{value:.3f}")
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else printable(str(value))


def _minus(figure: str) -> str:
    return figure.replace("-", "−")


def _terminal_table(table: PlainTable) -> Table:
    names, rows = table
    drawn = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(names), header_style="bold")
    texts = [any(isinstance(row[at], str) for row in rows) for at in range(len(rows[0]) if rows else 0)]
    for at, text in enumerate(texts):
        drawn.add_column(
            names[at] if names else "", justify="left" if text else "right", overflow="fold", no_wrap=not text
        )
    for row in rows:
        drawn.add_row(*(Text(_shown(value)) for value in row))
    return drawn


def _terminal_worst(card: ReportCard) -> list[RenderableType]:
    shown: list[RenderableType] = []
    for one in card.worst[:WORST_IN_TERMINAL]:
        text = one.text
        origin = [text.origin, text.condition] if text else [f"pair {one.index}"]
        shown.append(_line(" · ".join([f"margin {_shown(one.margin)}", *filter(None, origin)])))
        for name, said in (
            (("prompt", text.prompt), ("better", text.chosen), ("worse", text.rejected)) if text else ()
        ):
            shown.append(_line(f"  {name:<6}  {said}"))
    more = len(card.worst) - WORST_IN_TERMINAL
    return [*shown, Text(f"and {more:,} more", style="dim")] if more > 0 else shown


def _line(text: str) -> Text:
    """One line, as much of the text as fits."""
    flat = printable(text).replace("\n", "⏎").replace("\t", " ")
    return Text(flat, no_wrap=True, overflow="ellipsis")


def _plots(card: ReportCard) -> Iterator[str]:
    if card.controls is not None:
        rows = [(one.name, one.accuracy, one.twins) for one in card.controls.rows]
        yield plots.accuracy_bars("Controls", rows)
    if card.overall is not None:
        groups = [card.overall, *card.conditions[:MOST_BARS]]
        yield plots.accuracy_bars("Accuracy by condition", [(one.name, one.accuracy, None) for one in groups])
        yield plots.reliability(card.overall.calibration)
    if card.scores is not None:
        yield plots.histogram(card.scores)
    if card.length is not None:
        yield plots.length_curve(card.length.curve)
        bars = [(name, one, None) for name, one in length_parts(card).items()]
        yield plots.accuracy_bars("Accuracy and length", bars)


def _html_table(name: str, table: PlainTable) -> str:
    names, rows = table
    kinds = ["" if any(isinstance(row[at], str) for row in rows) else "number" for at in range(len(names))]
    head = "".join(
        f"<th scope='col' class='{kind}'>{_safe(one)}</th>" for one, kind in zip(names, kinds, strict=True)
    )
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    drawn = f"<div class='wide'><table class='{name}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    if name != "reliability":
        return drawn
    return f"<details><summary>{len(rows):,} bins</summary>{drawn}</details>"


def _cell(value: Any) -> str:
    if not isinstance(value, str):
        return f"<td class='number'>{_shown(value)}</td>"
    if len(value) <= SHORT and "\n" not in value:
        return f"<td>{_safe(value)}</td>"
    start = _safe(value[:SHORT].replace("\n", " "))
    return f"<td><details><summary>{start}…</summary><pre>{_safe(value)}</pre></details></td>"


def _safe(text: str) -> str:
    """Text that is nothing but text in a page, whatever it holds; lone surrogates would not even be written."""
    return escape(printable(text))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1>
<div class="verdict {kind}"><strong>{heading}</strong>{verdict}</div>
<div class="figures">{figures}</div>
<div class="plots">{plots}</div>
{sections}
</main></body></html>
"""

_STYLE = (
    f":root{{--a:{BLUE};--b:{ORANGE};--good:{GREEN}}}"
    + """
:root{color-scheme:light dark;--paper:#fbfaf8;--card:#fff;--ink:#1d1d1f;--soft:#66666e;--line:#e4e2dd;
--red:#a3201a;--redback:#fdeceb;--amber:#6e4a00;--amberback:#fdf4e0;--green:#0c4a21;--greenback:#d9f2df}
@media(prefers-color-scheme:dark){:root{--a:#56B4E9;--b:#E69F00;--paper:#141416;--card:#1c1c20;--ink:#e9e9ec;
--soft:#a2a2ab;--line:#34343b;--red:#ff9d95;--redback:#3b1a18;--amber:#f0c674;--amberback:#352a14;
--green:#d3f5dc;--greenback:#174a2a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:24px;margin:0 0 16px;font-weight:650;overflow-wrap:anywhere}
h2{font-size:16px;margin:32px 0 4px;font-weight:650}
section p{white-space:pre-line;margin:0 0 8px;color:var(--soft);font-size:13.5px;max-width:76ch}
.verdict{border-radius:10px;padding:12px 18px;overflow-wrap:anywhere}
.verdict ul{margin:6px 0 0;padding-left:20px}
.failed{background:var(--redback);color:var(--red)}.remarks{background:var(--amberback);color:var(--amber)}
.good{background:var(--greenback);color:var(--green)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(156px,1fr));gap:10px;margin:18px 0}
.figures div,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px}
.figures b{display:block;font-size:21px;font-weight:600;font-variant-numeric:tabular-nums}
.figures span{color:var(--soft);font-size:13px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:14px;align-items:start}
figure{margin:0;padding:14px 16px}figcaption{font-weight:600;font-size:14px;margin-bottom:4px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
svg .a{fill:var(--a);stroke:var(--a)}svg .a.area{stroke:none;opacity:.72}
svg .a.thin{fill:none;stroke-width:1.5}svg .b.line{fill:none;stroke:var(--b);stroke-width:2}
svg .grid{stroke:var(--line)}svg .chance{stroke:var(--ink);stroke-width:1.4;stroke-dasharray:5 4}
svg .whisker{stroke:var(--ink);stroke-width:1.6}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:4px 18px 4px 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}
th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--line)}
.number{text-align:right;white-space:nowrap}
.worst{width:100%;min-width:860px;table-layout:fixed}.worst td{border-bottom:1px solid var(--line)}
.worst th:nth-child(-n+2){width:72px}.worst th:nth-child(3){width:104px}.worst th:nth-child(4){width:150px}
summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:12.5px/1.55 ui-monospace,Menlo,Consolas,monospace;
margin:6px 0;padding:8px;background:var(--card);border:1px solid var(--line);border-radius:6px}
"""
)
