"""What `tuner data` shows: which tokens are learned and which are not, counts, and what is wrong."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuner.data.data_report import HISTOGRAM, DataReport, PartReport
from tuner.data.encoding import Tokenizer
from tuner.data.examples import Examples
from tuner.printable import printable

NAMED = 5
"""Origins named in one finding; the rest are counted."""

Label = Callable[[int], str]

Passes = Sequence[Sequence[int]]
"""Packed rows: the indices of the samples in each, in order."""


@dataclass(frozen=True)
class Piece:
    """Tokens shown together: one, or several that share a character."""

    text: str
    ids: list[int]
    position: int
    """Of the first token, counted from the sample's beginning."""
    weight: float
    control: bool
    """Whether it is a special token."""


def errors(examples: Examples, tokenizer: Tokenizer, report: DataReport | None = None) -> list[str]:
    """What must be put right before training: rows that teach nothing, end tokens not learned, double BOS.

    A sentence each, with the origins of the first rows.
    """
    return [
        said
        for said in (
            _said(examples, _teach_nothing(examples), "teach nothing: every token has weight 0"),
            _said(
                examples,
                _without_end(examples, tokenizer, report),
                "have a learned part without an end token, so the model would not learn to stop; "
                "use another template",
            ),
            _said(
                examples, _double_bos(examples, tokenizer), "begin with BOS twice; take it out of the rows"
            ),
        )
        if said
    ]


def notices(examples: Examples, tokenizer: Tokenizer, report: DataReport | None = None) -> list[str]:
    """What is worth knowing: unknown tokens, cut samples, and the report's notes."""
    said = []
    if tokenizer.unk_token_id is not None:
        unknown = np.flatnonzero(examples.tokens_T == tokenizer.unk_token_id)
        share = len(unknown) / max(1, len(examples.tokens_T))
        said.append(
            _said(
                examples, _samples_of(examples, unknown), f"hold unknown tokens ({share:.2%} of all tokens)"
            )
        )
    if report is not None:
        for source in report.sources:
            if source.cut + source.cut_to_nothing:
                lost = (
                    f", {source.cut_to_nothing:,} of them dropped with nothing left"
                    if source.cut_to_nothing
                    else ""
                )
                said.append(
                    f"{source.path}: {source.cut + source.cut_to_nothing:,} rows were cut at max_length{lost}"
                )
        said += report.notes
    return [one for one in said if one]


def findings(examples: Examples, tokenizer: Tokenizer, report: DataReport | None = None) -> list[str]:
    """Errors, then notices."""
    return errors(examples, tokenizer, report) + notices(examples, tokenizer, report)


def pieces(examples: Examples, index: int, tokenizer: Tokenizer) -> Iterator[Piece]:
    """A sample's tokens as text. Tokens that only together make a character stand in one piece."""
    tokens, weights = examples.example(index)
    control = _control_ids(tokenizer)
    held: list[int] = []
    for position, (token, weight) in enumerate(zip(tokens.tolist(), weights.tolist(), strict=True)):
        held.append(token)
        text = str(tokenizer.decode(held))
        last = position + 1 == len(tokens) or weights[position + 1] != weight or len(held) == 4
        if "\ufffd" in text and not last:
            continue
        yield Piece(text, held, position + 1 - len(held), weight, len(held) == 1 and token in control)
        held = []


def statistics(examples: Examples, report: DataReport | None = None, passes: Passes | None = None) -> Table:
    """Counts as a table: lengths, share learned, what became of the rows, packing."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in _figures(examples, report, passes):
        table.add_row(name, value)
    return table


def terminal(
    examples: Examples,
    tokenizer: Tokenizer,
    passes: Passes | None = None,
    report: DataReport | None = None,
    *,
    color: bool = True,
    limit: int = 4,
    label: Label = lambda index: "",
) -> RenderableType:
    """The first samples (or passes) with their tokens, statistics and findings, for a rich console.

    label: what a sample is, beside where it is from. Learned tokens are green, special tokens blue; without color
    learned parts stand in ⟦ ⟧.
    """
    shown: list[RenderableType] = []
    for heading, segments in _rows(examples, passes, limit):
        if heading:
            shown += [Text(heading, style="bold reverse"), Text()]
        for index, begin in segments:
            shown += [
                Text(_describe(examples, index, begin, label), style="bold"),
                _terminal_tokens(examples, index, tokenizer, color),
                Text(),
            ]
    shown.append(statistics(examples, report, passes))
    found = findings(examples, tokenizer, report)
    wrong = errors(examples, tokenizer, report)
    shown += [
        Text(f"\n{'error' if one in wrong else 'note'}: {one}", style="red" if one in wrong else "yellow")
        for one in found
    ]
    return Group(*shown)


def html(
    examples: Examples,
    tokenizer: Tokenizer,
    passes: Passes | None = None,
    report: DataReport | None = None,
    *,
    title: str = "tuner data",
    limit: int = 24,
    label: Label = lambda index: "",
) -> str:
    """The same as one HTML page that needs nothing else; light and dark as the reader's system is."""
    wrong = errors(examples, tokenizer, report)
    found = "".join(
        f'<li class="{"error" if one in wrong else "note"}">{escape(one)}</li>'
        for one in findings(examples, tokenizer, report)
    )
    figures = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for name, value in _figures(examples, report, passes)
    )
    rows = "".join(
        f"<section><h2>{escape(heading)}</h2>{_strip(examples, segments)}"
        f"{''.join(_html_sample(examples, index, begin, tokenizer, label) for index, begin in segments)}</section>"
        if heading
        else "".join(_html_sample(examples, index, begin, tokenizer, label) for index, begin in segments)
        for heading, segments in _rows(examples, passes, limit)
    )
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        figures=figures,
        histogram=_html_histogram(PartReport.of(examples)),
        findings=f"<ul>{found}</ul>" if found else '<p class="good">Nothing wrong was found.</p>',
        sources=_html_sources(report),
        rows=rows,
    )


def _rows(
    examples: Examples, passes: Passes | None, limit: int
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """What is shown: (heading, [(sample, where it begins in its pass)]) of the first passes, or samples."""
    lengths = examples.lengths
    if passes is None:
        for index in range(min(limit, len(examples))):
            yield "", [(index, 0)]
        return
    for number, indices in enumerate(passes[:limit], 1):
        begins = np.concatenate([[0], np.cumsum(lengths[list(indices)])])
        size = f"{_count(len(indices), 'segment')}, {_count(int(begins[-1]), 'token')}"
        heading = f"pass {number} of {len(passes):,}: {size}"
        yield heading, [(index, int(begin)) for index, begin in zip(indices, begins[:-1], strict=True)]


def _describe(examples: Examples, index: int, begin: int, label: Label) -> str:
    tokens, weights = examples.example(index)
    learned = int(np.count_nonzero(weights))
    positions = f"positions 0–{len(tokens) - 1:,}" + (f" (from {begin:,} in the pass)" if begin else "")
    where = " · ".join(filter(None, (examples.origin(index), label(index))))
    return f"{where} · {_count(len(tokens), 'token')}, {learned:,} learned · {positions}"


def _terminal_tokens(examples: Examples, index: int, tokenizer: Tokenizer, color: bool) -> Text:
    text, before = Text(), 0.0
    for number, piece in enumerate(pieces(examples, index, tokenizer)):
        if not color and bool(piece.weight) != bool(before):
            text.append("⟦" if piece.weight else "⟧")
        before = piece.weight
        style = "dim"
        if piece.weight:
            style = "black on green" if number % 2 else "black on bright_green"
        elif piece.control:
            style = "blue"
        text.append(_visible(piece.text), style=style if color else "")
    if before and not color:
        text.append("⟧")
    return text


def _visible(text: str) -> str:
    """Line ends as a sign and a line end; nothing that could steer the terminal."""
    return printable(text).replace("\n", "⏎\n")


def _figures(examples: Examples, report: DataReport | None, passes: Passes | None) -> list[tuple[str, str]]:
    part, lengths = PartReport.of(examples), examples.lengths
    figures = [
        ("samples", f"{part.samples:,}"),
        ("tokens", f"{part.tokens:,}"),
        ("learned", f"{part.learned_share:.1%}"),
        ("median length", f"{int(np.median(lengths)):,}"),
        ("longest", f"{part.longest:,}"),
    ]
    if report is not None:
        totals = {
            "rows read": "rows",
            "duplicates": "duplicates",
            "too long": "too_long",
            "cut": "cut",
            "split": "split",
            "dropped": ("dropped_too_long", "dropped_duplicates", "cut_to_nothing", "switched_off"),
        }
        for name, fields in totals.items():
            fields = (fields,) if isinstance(fields, str) else fields
            count = sum(getattr(source, field) for source in report.sources for field in fields)
            if count:
                figures.append((name, f"{count:,}"))
    if passes:
        sizes = [int(lengths[list(indices)].sum()) for indices in passes]
        figures += [
            ("passes", f"{len(passes):,}"),
            ("fullest pass", f"{max(sizes):,}"),
            ("mean fill", f"{sum(sizes) / (max(sizes) * len(sizes)):.1%}"),
        ]
    return figures


def _teach_nothing(examples: Examples) -> np.ndarray:
    """Samples without a learned token; none where no sample has any: those are prompts."""
    if not examples.weights_T.any():
        return np.zeros(0, dtype=np.int64)
    learned = np.concatenate([[0], np.cumsum(examples.weights_T > 0)])
    return np.flatnonzero(np.diff(learned[examples.offsets]) == 0)


def _without_end(examples: Examples, tokenizer: Tokenizer, report: DataReport | None) -> np.ndarray:
    """Samples in which a learned part ends on something else than a special token.

    White space may follow the special token (learn="all"). Where samples were cut or split, those as long as
    the longest are left out: they end where they were cut.
    """
    learned = examples.weights_T > 0
    last = np.zeros(len(learned), dtype=bool)
    last[examples.offsets[1:] - 1] = True
    ends = np.flatnonzero(learned & (last | ~np.append(learned[1:], False)))
    control = np.array(sorted(_control_ids(tokenizer)), dtype=np.int64)
    suspects = ends[~np.isin(examples.tokens_T[ends], control)]
    before = np.maximum(suspects - 1, 0)
    blank = np.array(
        [not str(tokenizer.decode([int(examples.tokens_T[at])])).strip() for at in suspects], dtype=bool
    )
    suspects = suspects[~(blank & np.isin(examples.tokens_T[before], control))]
    samples = _samples_of(examples, suspects)
    if report is not None and any(source.cut or source.split for source in report.sources):
        samples = samples[examples.lengths[samples] < examples.lengths.max()]
    return samples


def _double_bos(examples: Examples, tokenizer: Tokenizer) -> np.ndarray:
    if tokenizer.bos_token_id is None:
        return np.zeros(0, dtype=np.int64)
    starts = examples.offsets[:-1]
    seconds = np.minimum(starts + 1, len(examples.tokens_T) - 1)
    bos = examples.tokens_T == tokenizer.bos_token_id
    return np.flatnonzero(bos[starts] & bos[seconds] & (examples.lengths > 1))


def _samples_of(examples: Examples, places: np.ndarray) -> np.ndarray:
    return np.unique(np.searchsorted(examples.offsets, places, side="right") - 1)


def _said(examples: Examples, samples: np.ndarray, what: str) -> str:
    if not len(samples):
        return ""
    origins = list(dict.fromkeys(examples.origin(int(index)) for index in samples[:NAMED]))
    more = f" and {len(samples) - NAMED:,} more" if len(samples) > NAMED else ""
    return f"{_count(len(samples), 'sample')} {what} ({', '.join(origins)}{more})"


def _control_ids(tokenizer: Tokenizer) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {token for token, value in added.items() if getattr(value, "special", True)}
    return ids | set(getattr(tokenizer, "all_special_ids", ()))


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _html_sample(examples: Examples, index: int, begin: int, tokenizer: Tokenizer, label: Label) -> str:
    shown = enumerate(pieces(examples, index, tokenizer))
    tokens = "".join(_html_token(piece, bool(number % 2)) for number, piece in shown)
    return (
        f"<article><h3>{escape(_describe(examples, index, begin, label))}</h3><pre>{tokens}</pre></article>"
    )


def _html_token(piece: Piece, odd: bool) -> str:
    kind = " ".join(name for name, holds in (("l", piece.weight), ("o", odd), ("c", piece.control)) if holds)
    weight = "" if piece.weight in (0.0, 1.0) else f", weight {piece.weight:g}"
    tip = f"position {piece.position}, id {' '.join(map(str, piece.ids))}{weight}"
    text = escape(piece.text).replace("\n", '<i aria-hidden="true">⏎</i>\n')
    return f'<span class="{kind}" title="{tip}">{text}</span>'


def _strip(examples: Examples, segments: list[tuple[int, int]]) -> str:
    """A pass as a bar: a block per segment as wide as it is long, filled as far as it is learned."""
    blocks = []
    for index, _ in segments:
        tokens, weights = examples.example(index)
        share = np.count_nonzero(weights) / len(tokens)
        tip = escape(f"{examples.origin(index)}: {len(tokens)} tokens, {share:.0%} learned")
        blocks.append(
            f'<div style="flex:{len(tokens)}" title="{tip}"><div style="width:{share:.1%}"></div></div>'
        )
    return f'<div class="strip">{"".join(blocks)}</div>'


def _html_histogram(part: PartReport) -> str:
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


def _html_sources(report: DataReport | None) -> str:
    if report is None:
        return ""
    columns = ("rows", "kept", "duplicates", "too_long", "cut", "split", "switched_off", "longest")
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in columns)
    rows = ""
    for source in report.sources:
        cells = "".join(f"<td>{getattr(source, name):,}</td>" for name in columns)
        rows += f"<tr><th>{escape(source.path)}</th>{cells}</tr>"
    return f"<table class='sources'><caption>Sources</caption><tr><th></th>{head}</tr>{rows}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
<header><h1>{title}</h1><p class="legend"><span class="l">learned</span><span>not learned</span>
<span class="c">special token</span></p></header>
<div class="figures">{figures}</div>
<div class="findings">{findings}</div>
<div class="tables">{histogram}{sources}</div>
{rows}
</main></body></html>
"""

_STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf8;--card:#fff;--ink:#1d1d1f;--soft:#75757d;--line:#e4e2dd;
--learned:#c9ecd0;--learned2:#b5e2bf;--learnedink:#0c4a21;--control:#3a5fc8;--bar:#4caf6e;
--red:#b3261e;--redback:#fdeceb;--amber:#7a5200;--amberback:#fdf4e0}
@media(prefers-color-scheme:dark){:root{--paper:#141416;--card:#1c1c20;--ink:#e9e9ec;--soft:#96969f;--line:#303036;
--learned:#174a2a;--learned2:#1f5c36;--learnedink:#d3f5dc;--control:#93b0ff;--bar:#3f9d60;
--red:#ff9d95;--redback:#3b1a18;--amber:#f0c674;--amberback:#352a14}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 24px 64px}
header{display:flex;flex-wrap:wrap;align-items:baseline;justify-content:space-between;gap:8px 24px}
h1{font-size:24px;margin:0;font-weight:650}h2{font-size:15px;margin:36px 0 8px;font-weight:650}
h3{font-size:13px;margin:0;padding:10px 16px;color:var(--soft);font-weight:500;
border-bottom:1px solid var(--line);
overflow-wrap:anywhere}
.legend{margin:0;display:flex;gap:16px;color:var(--soft);font-size:13px}
.legend span{padding:1px 8px;border-radius:4px}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(128px,1fr));gap:10px;margin:20px 0}
.figures div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px}
.figures b{display:block;font-size:20px;font-weight:600;font-variant-numeric:tabular-nums}
.figures span{color:var(--soft);font-size:13px}
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
