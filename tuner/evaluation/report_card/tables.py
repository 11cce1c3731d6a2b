"""A report card as figures for results.json, and as plain tables for trackers, the terminal and the page."""

from __future__ import annotations

from typing import Any

from tuner.evaluation.report_card.card import QUANTILES, SAME_LENGTH, SEEN, Group, ReportCard
from tuner.evaluation.report_card.measures import Accuracy

Table = tuple[list[str], list[list[Any]]]
"""Names of the columns, and rows of texts, numbers or None."""

ACCURACY = ["accuracy", "low", "high", "rows", "pairs"]


def results(card: ReportCard) -> dict[str, Any]:
    """The figures for results.json; controls that were not run are absent, twins None where there are none."""
    figures: dict[str, Any] = {}
    if card.controls is not None:
        figures = {
            control.name: {"accuracy": control.accuracy.value, "twins": control.twins}
            for control in card.controls.rows
        } | {"controls_over": card.controls.over}
    if card.overall is not None:
        figures["overall"] = _figures(card.overall)
    figures["conditions"] = {group.name: _figures(group) for group in card.conditions}
    figures["sources"] = {group.name: _figures(group) for group in card.sources}
    if card.length is not None:
        length = card.length
        figures["length"] = {
            "pearson": length.pearson,
            "spearman": length.spearman,
            "longer_wins": length.longer_wins.value,
            "controlled": length.controlled.value if length.controlled else None,
        }
    return figures | {"verdict": list(card.verdict), "failed": card.failed}


def _figures(group: Group) -> dict[str, Any]:
    return {
        "accuracy": group.accuracy.value,
        "interval": [group.accuracy.low, group.accuracy.high],
        "margin": group.margin,
        "ece": group.calibration.ece,
        "rows": group.accuracy.rows,
    }


def tables(card: ReportCard) -> dict[str, Table]:
    """The tables of the card by name, without those that have no rows."""
    groups = ([card.overall] if card.overall else []) + list(card.conditions)
    by_name = {
        "controls": _controls(card),
        "conditions": _groups("condition", groups),
        "conditions_by_control": _by_control(card),
        "sources": _groups("source", card.sources),
        "reliability": _reliability(card),
        "length": _length(card),
        "position": _position(card),
        "scores": _scores(card),
        "histogram": _histogram(card),
        "worst": _worst(card),
    }
    return {name: table for name, table in by_name.items() if table[1]}


def _cells(right: Accuracy) -> list[Any]:
    return [right.value, right.low, right.high, right.rows, right.pairs]


def _controls(card: ReportCard) -> Table:
    rows = [
        [
            control.name,
            control.accuracy.value,
            control.accuracy.low,
            control.accuracy.high,
            control.twins,
            control.changed,
        ]
        for control in (card.controls.rows if card.controls else ())
    ]
    return ["control", "accuracy", "low", "high", "twins both right", "winner changed"], rows


def _groups(kind: str, groups: list[Group] | tuple[Group, ...]) -> Table:
    rows = [[group.name, *_cells(group.accuracy), group.margin, group.calibration.ece] for group in groups]
    return [kind, *ACCURACY, "margin", "ece"], rows


def _by_control(card: ReportCard) -> Table:
    names = list(dict.fromkeys(name for group in card.conditions for name in group.controls))
    rows = [
        [group.name, group.accuracy.value, *(group.controls[name] for name in names)]
        for group in card.conditions
        if names
    ]
    return ["condition", SEEN, *names], rows


def _reliability(card: ReportCard) -> Table:
    groups = ([card.overall] if card.overall else []) + list(card.conditions)
    rows = [
        [group.name, bin_.low, bin_.high, bin_.confidence, bin_.right, bin_.share, bin_.pairs]
        for group in groups
        for bin_ in group.calibration.bins
    ]
    return ["pairs of", "from", "to", "confidence", "share right", "share of pairs", "pairs"], rows


def length_parts(card: ReportCard) -> dict[str, Accuracy]:
    """Name -> accuracy of the rule "the longer answer wins", and of the scores on all pairs and by their lengths."""
    if card.length is None or card.overall is None:
        return {}
    parts = {
        "rule: longer wins": card.length.longer_wins,
        "scores: all pairs": card.overall.accuracy,
        f"lengths within {SAME_LENGTH:.0%}": card.length.controlled,
        "better is longer": card.length.better_is_longer,
        "better is shorter": card.length.better_is_shorter,
    }
    return {name: part for name, part in parts.items() if part is not None}


def _length(card: ReportCard) -> Table:
    return ["measured on", *ACCURACY], [[name, *_cells(part)] for name, part in length_parts(card).items()]


def _position(card: ReportCard) -> Table:
    parts = {
        f"score read at {place.low:,} to {place.high:,} tokens": place.accuracy for place in card.positions
    }
    parts |= {
        name: part
        for name, part in (("prompt cut", card.cut), ("prompt not cut", card.uncut))
        if part and card.cut
    }
    return ["place", *ACCURACY], [[name, *_cells(part)] for name, part in parts.items()]


def _scores(card: ReportCard) -> Table:
    sides = {"better": card.scores.better, "worse": card.scores.worse} if card.scores else {}
    rows = [[name, side.mean, side.deviation, *side.quantiles] for name, side in sides.items()]
    return ["answers", "mean", "deviation", *(f"{share:.0%}" for share in QUANTILES)], rows


def _histogram(card: ReportCard) -> Table:
    scores = card.scores
    rows = (
        zip(scores.edges[:-1], scores.edges[1:], scores.better_counts, scores.worse_counts, strict=True)
        if scores
        else ()
    )
    return ["from", "to", "better", "worse"], [list(row) for row in rows]


def _worst(card: ReportCard) -> Table:
    rows = [
        [pair.index, pair.margin, text.condition, text.origin, text.prompt, text.chosen, text.rejected]
        if (text := pair.text)
        else [pair.index, pair.margin, None, None, None, None, None]
        for pair in card.worst
    ]
    return ["pair", "margin", "condition", "origin", "prompt", "better", "worse"], rows
