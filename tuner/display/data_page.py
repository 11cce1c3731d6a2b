"""`tuner data` as one page of HTML that needs nothing else."""

import numpy as np

from tuner.data.data_report import HISTOGRAM, DataReport, PartReport
from tuner.data.encoding import Tokenizer
from tuner.data.examples import Examples
from tuner.data.inspection import (
    Label,
    Passes,
    Piece,
    Segment,
    describe,
    errors,
    groups,
    notices,
    pieces,
    readings,
    statistics,
)
from tuner.display.page_frame import figure_boxes, page
from tuner.printable import safe


def data_html(
    examples: Examples,
    tokenizer: Tokenizer,
    passes: Passes | None = None,
    report: DataReport | None = None,
    *,
    title: str = "tuner data",
    limit: int = 24,
    label: Label = lambda index: "",
    tokens_per_pass: int | None = None,
) -> str:
    """The first samples (or passes) with their tokens, statistics and findings."""
    rows = ""
    for group in groups(examples, passes, limit):
        samples = "".join(_sample(examples, segment, tokenizer, label) for segment in group.segments)
        heading = f"<h2>{safe(group.heading)}</h2>{_strip(examples, group.segments)}"
        rows += f"<section>{heading}{samples}</section>" if group.heading else samples
    values = statistics(examples, report, passes, tokens_per_pass)
    figures = ((value, name) for name, value in values)
    tables = _length_histogram(PartReport.of(examples)) + _sources(report) + _readings(report)
    return page(
        title,
        _STYLE,
        [
            f"<header><h1>{safe(title)}</h1>{_LEGEND}</header>",
            figure_boxes(figures),
            f'<div class="findings">{_findings(examples, tokenizer, report)}</div>',
            f'<div class="tables">{tables}</div>',
            rows,
        ],
    )


def _findings(examples: Examples, tokenizer: Tokenizer, report: DataReport | None) -> str:
    items = [f'<li class="error">{safe(text)}</li>' for text in errors(examples, tokenizer, report)]
    items += [f'<li class="note">{safe(text)}</li>' for text in notices(examples, tokenizer, report)]
    return f"<ul>{''.join(items)}</ul>" if items else '<p class="good">Nothing wrong was found.</p>'


def _sample(examples: Examples, segment: Segment, tokenizer: Tokenizer, label: Label) -> str:
    shown = enumerate(pieces(examples, segment.index, tokenizer))
    tokens = "".join(_token(piece, bool(number % 2)) for number, piece in shown)
    return f"<article><h3>{safe(describe(examples, segment, label))}</h3><pre>{tokens}</pre></article>"


def _token(piece: Piece, odd: bool) -> str:
    classes = {"l": piece.weight, "o": odd, "c": piece.control}
    kind = " ".join(name for name, applies in classes.items() if applies)
    weight = "" if piece.weight in (0.0, 1.0) else f", weight {piece.weight:g}"
    tip = f"position {piece.position}, id {' '.join(map(str, piece.ids))}{weight}"
    text = safe(piece.text).replace("\n", '<i aria-hidden="true">⏎</i>\n')
    return f'<span class="{kind}" title="{tip}">{text}</span>'


def _strip(examples: Examples, segments: list[Segment]) -> str:
    """A pass as a bar: a block per segment, as wide as it is long, filled by the share the loss is taken on."""
    blocks = []
    for segment in segments:
        tokens, weights = examples.example(segment.index)
        share = np.count_nonzero(weights) / len(tokens)
        tip = safe(f"{examples.origin(segment.index)}: {len(tokens)} tokens, {share:.0%} in the loss")
        blocks.append(
            f'<div style="flex:{len(tokens)}" title="{tip}"><div style="width:{share:.1%}"></div></div>'
        )
    return f'<div class="strip">{"".join(blocks)}</div>'


def _length_histogram(part: PartReport) -> str:
    used = [index for index, count in enumerate(part.histogram) if count]
    most = max(part.histogram)
    bars = []
    for index in range(used[0], used[-1] + 1):
        count = part.histogram[index]
        bound = f"≤ {HISTOGRAM[index]:,}" if index < len(HISTOGRAM) else f"> {HISTOGRAM[-1]:,}"
        bars.append(
            f'<tr><th>{bound}</th><td class="bar"><div style="width:{count / most:.1%}"></div></td>'
            f"<td>{count:,}</td></tr>"
        )
    return f"<table class='histogram'><caption>Length in tokens, samples</caption>{''.join(bars)}</table>"


def _sources(report: DataReport | None) -> str:
    if report is None:
        return ""
    columns = ("rows", "kept", "duplicates", "too_long", "cut", "split", "switched_off", "longest")
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in columns)
    rows = ""
    for source in report.sources:
        cells = "".join(f"<td>{getattr(source, name):,}</td>" for name in columns)
        rows += f"<tr><th>{safe(source.path)}</th>{cells}</tr>"
    return f"<table class='sources'><caption>Sources</caption><tr><th></th>{head}</tr>{rows}</table>"


def _readings(report: DataReport | None) -> str:
    rows = "".join(
        f"<tr><th>{safe(description)}</th><td>{safe(names)}</td></tr>"
        for description, names in readings(report)
    )
    return f"<table class='readings'><caption>Control tokens</caption>{rows}</table>" if rows else ""


_LEGEND = """<p class="legend"><span class="l">in the loss</span><span>not in the loss</span>
<span class="c">special token</span></p>"""

_STYLE = """
:root{--learned:#c9ecd0;--learned2:#b5e2bf;--learnedink:#0c4a21;--control:#3a5fc8;--bar:#4caf6e}
@media(prefers-color-scheme:dark){:root{--learned:#174a2a;--learned2:#1f5c36;--learnedink:#d3f5dc;--control:#93b0ff;
--bar:#3f9d60}}
main{max-width:1080px}
header{display:flex;flex-wrap:wrap;align-items:baseline;justify-content:space-between;gap:8px 24px}
h1{margin:0}h2{font-size:15px;margin:36px 0 8px}
h3{font-size:13px;margin:0;padding:10px 16px;color:var(--soft);font-weight:500;
border-bottom:1px solid var(--line);
overflow-wrap:anywhere}
.legend{margin:0;display:flex;gap:16px;color:var(--soft);font-size:13px}
.legend span{padding:1px 8px;border-radius:4px}
.figures{grid-template-columns:repeat(auto-fill,minmax(128px,1fr));margin:20px 0}.figures b{font-size:20px}
.findings ul{list-style:none;margin:0;padding:0}
.findings li,.good{border-radius:8px;padding:8px 14px;margin:6px 0;
overflow-wrap:anywhere}
.error{background:var(--redback);color:var(--red)}.note{background:var(--amberback);color:var(--amber)}
.good{background:var(--learned);color:var(--learnedink)}
.tables{display:flex;flex-wrap:wrap;gap:12px 40px;margin:20px 0 8px;align-items:flex-start}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding-bottom:4px}
td,th{padding:3px 12px 3px 0;text-align:right;font-weight:400}
.tables{overflow-x:auto}.sources th:first-child{text-align:left;overflow-wrap:anywhere;min-width:140px}
.sources tr:first-child th{color:var(--soft)}
.readings th,.readings td{text-align:left;vertical-align:top;overflow-wrap:anywhere}.readings th{min-width:200px}
.bar{width:220px;padding-right:10px}.bar div{background:var(--bar);height:12px;border-radius:3px}
article{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:12px 0;overflow:hidden}
pre{margin:0;padding:14px 16px;
font:13.5px/1.75 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere;color:var(--soft)}
.l{background:var(--learned);color:var(--learnedink)}.l.o{background:var(--learned2)}
.c{color:var(--control)}.l.c{color:var(--learnedink);font-weight:650}
pre span{padding:2px 0}pre span:hover{outline:1px solid currentColor}
pre i{opacity:.45;font-style:normal}
.strip{display:flex;gap:2px;height:14px}.strip>div{background:var(--line);border-radius:3px;overflow:hidden;min-width:2px}
.strip>div>div{background:var(--bar);height:100%}
"""
