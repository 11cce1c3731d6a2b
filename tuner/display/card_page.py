"""A reward model's report card, in a terminal and as one page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType

from tuner.display import plots
from tuner.display.page_frame import figure_boxes, page
from tuner.display.rich_text import rich_text
from tuner.display.sheet import STYLE, cell_text, html_table, minus, one_line, terminal_table
from tuner.evaluation.report_card.card import SAME_LENGTH, ReportCard
from tuner.evaluation.report_card.tables import Table as PlainTable
from tuner.evaluation.report_card.tables import length_parts, tables
from tuner.printable import safe

WORST_IN_TERMINAL = 5
MOST_BARS = 30

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
"""Tables shown, in this order. The histogram is drawn only."""

ROWS_OF_CONTROLS = {
    "twins": "Over the rows with a twin: the same two answers under conditions that prefer opposite ones. Without "
    "a condition exactly half of them are right, and no twins both.",
    "conditions": "Over the rows that name a condition; none has a twin.",
    "all": "Over all rows: none names a condition.",
}
CONTROLS = {
    "seen": "the condition of the row, in wordings used in training",
    "unseen": "wordings not used in training, with the same key word",
    "novel": "wordings that share no word with those used in training",
    "blank": "no condition",
    "swapped": "the wording of another condition",
}


def terminal(card: ReportCard) -> RenderableType:
    """The card for a rich console: verdict, figures, tables, and the first of the worst pairs.

    No fact is conveyed by color alone, and without a terminal it is plain lines.
    """
    shown: list[RenderableType] = [
        rich_text(
            _heading(card),
            style="bold red" if card.failed else "bold yellow" if card.verdict else "bold green",
        )
    ]
    shown += [rich_text(f"- {sentence}") for sentence in card.verdict]
    shown += [rich_text(), terminal_table(([], [[name, value] for value, name in _figures(card)]))]
    for name, title, note, table in _parts(card):
        shown += [rich_text(f"\n{title}", style="bold")] + ([rich_text(note, style="dim")] if note else [])
        if name == "worst":
            shown += _terminal_worst(card)
        else:
            shown.append(terminal_table(_of_all(table) if name == "reliability" else table))
    return Group(*shown)


def html(card: ReportCard, title: str) -> str:
    """The card as one HTML page."""
    verdict = "".join(f"<li>{safe(sentence)}</li>" for sentence in card.verdict)
    sections = "".join(
        f"<section><h2>{safe(heading)}</h2>{f'<p>{safe(note)}</p>' if note else ''}{html_table(name, table)}</section>"
        for name, heading, note, table in _parts(card)
    )
    kind = "failed" if card.failed else "remarks" if card.verdict else "good"
    return page(
        title,
        STYLE,
        [
            f"<h1>{safe(title)}</h1>",
            f'<div class="verdict {kind}"><strong>{safe(_heading(card))}</strong>'
            f"{f'<ul>{verdict}</ul>' if verdict else ''}</div>",
            figure_boxes(_figures(card)),
            f'<div class="plots">{"".join(_plots(card))}</div>',
            sections,
        ],
    )


def _heading(card: ReportCard) -> str:
    if card.failed:
        return "This reward model fails:"
    return "Nothing fails, but mind:" if card.verdict else "Nothing wrong was found."


def _figures(card: ReportCard) -> list[tuple[str, str]]:
    """(value, name) of the figures at the top."""
    if card.overall is None:
        return []
    accuracy = card.overall.accuracy
    figures = [(f"{accuracy.value:.3f}", f"accuracy ({accuracy.low:.3f} to {accuracy.high:.3f})")]
    seen = card.controls.rows[0] if card.controls else None
    if seen is not None and seen.twins is not None:
        figures.append((f"{seen.twins:.3f}", "twins both right"))
    if card.length is not None:
        figures.append((f"{card.length.longer_wins.value:.3f}", "if the longer answer won"))
        if card.length.spearman is not None:
            figures.append((minus(f"{card.length.spearman:+.2f}"), "rank correlation with length"))
    figures += [
        (f"{card.overall.calibration.ece:.3f}", "calibration error"),
        (minus(f"{card.overall.margin:.2f}"), "mean margin"),
    ]
    if card.scores is not None and card.scores.outside is not None:
        figures.append((f"{card.scores.outside:.1%}", f"scores outside ±{card.scores.bound:g}"))
    pairs = [(f"{accuracy.pairs:,}", "pairs")] if accuracy.pairs != accuracy.rows else []
    return [*figures, (f"{accuracy.rows:,}", "rows"), *pairs]


def _parts(card: ReportCard) -> Iterator[tuple[str, str, str, PlainTable]]:
    """(name, title, note, table) of every table shown."""
    drawn, notes = tables(card), _notes(card)
    for name, title in TITLES.items():
        if name in drawn:
            yield name, title, notes.get(name, ""), drawn[name]


def _notes(card: ReportCard) -> dict[str, str]:
    notes = {
        "reliability": "Confidence is the larger of P and 1 − P, with P = sigmoid(better − worse).",
        "length": f"Pairs of lengths within {SAME_LENGTH:.0%} show the accuracy that is left when length cannot help.",
        "scores": "Mean, standard deviation and quantiles.",
    }
    if card.controls is not None:
        rows = [f"{control.name}: {CONTROLS[control.name]}" for control in card.controls.rows]
        notes["controls"] = "\n".join([ROWS_OF_CONTROLS[card.controls.over], *rows])
    if card.length is not None and card.length.pearson is not None and card.length.spearman is not None:
        notes["length"] += (
            f"\nCorrelation of score and length: {card.length.pearson:+.3f} (Pearson), "
            f"{card.length.spearman:+.3f} (Spearman)."
        )
    return notes


def _of_all(table: PlainTable) -> PlainTable:
    """The reliability table's rows over all pairs, without those of single conditions."""
    return table[0][1:], [row[1:] for row in table[1] if row[0] == "all"]


def _terminal_worst(card: ReportCard) -> list[RenderableType]:
    shown: list[RenderableType] = []
    for pair in card.worst[:WORST_IN_TERMINAL]:
        text = pair.text
        origin = [text.origin, text.condition] if text else [f"pair {pair.index}"]
        shown.append(one_line(" · ".join([f"margin {cell_text(pair.margin)}", *filter(None, origin)])))
        texts = {"prompt": text.prompt, "better": text.chosen, "worse": text.rejected} if text else {}
        shown += [one_line(f"  {name:<6}  {content}") for name, content in texts.items()]
    more = len(card.worst) - WORST_IN_TERMINAL
    return [*shown, rich_text(f"and {more:,} more", style="dim")] if more > 0 else shown


def _plots(card: ReportCard) -> Iterator[str]:
    if card.controls is not None:
        rows = [(control.name, control.accuracy, control.twins) for control in card.controls.rows]
        yield plots.accuracy_bars("Controls", rows)
    if card.overall is not None:
        groups = [card.overall, *card.conditions[:MOST_BARS]]
        yield plots.accuracy_bars(
            "Accuracy by condition", [(group.name, group.accuracy, None) for group in groups]
        )
        yield plots.reliability(card.overall.calibration)
    if card.scores is not None:
        yield plots.histogram(card.scores)
    if card.length is not None:
        yield plots.length_curve(card.length.curve)
        bars = [(name, accuracy, None) for name, accuracy in length_parts(card).items()]
        yield plots.accuracy_bars("Accuracy and length", bars)
