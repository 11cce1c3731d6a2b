"""A report card as figures for results.json, and as plain tables: for trackers, the terminal and the page."""

from __future__ import annotations

from typing import Any

from tuner.evaluation.report_card.card import QUANTILES, SAME_LENGTH, SEEN, Group, ReportCard
from tuner.evaluation.report_card.measures import Accuracy

Table = tuple[list[str], list[list[Any]]]
"""Names of columns, and rows of text, numbers or None."""

ACCURACY = ["accuracy", "low", "high", "rows", "pairs"]


def results(card: ReportCard) -> dict[str, Any]:
    """The figures for results.json; controls that were not run are absent, twins None where there are none."""
    said: dict[str, Any] = {}
    if card.controls is not None:
        said = {
            one.name: {"accuracy": one.accuracy.value, "twins": one.twins} for one in card.controls.rows
        } | {"controls_over": card.controls.over}
    if card.overall is not None:
        said["overall"] = _figures(card.overall)
    said["conditions"] = {group.name: _figures(group) for group in card.conditions}
    said["sources"] = {group.name: _figures(group) for group in card.sources}
    if card.length is not None:
        length = card.length
        said["length"] = {
            "pearson": length.pearson,
            "spearman": length.spearman,
            "longer_wins": length.longer_wins.value,
            "controlled": length.controlled.value if length.controlled else None,
        }
    return said | {"verdict": list(card.verdict), "failed": card.failed}


def _figures(group: Group) -> dict[str, Any]:
    return {
        "accuracy": group.accuracy.value,
        "interval": [group.accuracy.low, group.accuracy.high],
        "margin": group.margin,
        "ece": group.calibration.ece,
        "rows": group.accuracy.rows,
    }


def tables(card: ReportCard) -> dict[str, Table]:
    """Every table of the card that has rows, by name."""
    groups = ([card.overall] if card.overall else []) + list(card.conditions)
    made = {
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
    return {name: table for name, table in made.items() if table[1]}


def _measured(right: Accuracy) -> list[Any]:
    return [right.value, right.low, right.high, right.rows, right.pairs]


def _controls(card: ReportCard) -> Table:
    rows = [
        [one.name, one.accuracy.value, one.accuracy.low, one.accuracy.high, one.twins, one.changed]
        for one in (card.controls.rows if card.controls else ())
    ]
    return ["control", "accuracy", "low", "high", "twins both right", "winner changed"], rows


def _groups(what: str, groups: list[Group] | tuple[Group, ...]) -> Table:
    rows = [[one.name, *_measured(one.accuracy), one.margin, one.calibration.ece] for one in groups]
    return [what, *ACCURACY, "margin", "ece"], rows


def _by_control(card: ReportCard) -> Table:
    names = list(dict.fromkeys(name for one in card.conditions for name in one.controls))
    rows = [
        [one.name, one.accuracy.value, *(one.controls[name] for name in names)]
        for one in card.conditions
        if names
    ]
    return ["condition", SEEN, *names], rows


def _reliability(card: ReportCard) -> Table:
    groups = ([card.overall] if card.overall else []) + list(card.conditions)
    rows = [
        [one.name, bin_.low, bin_.high, bin_.confidence, bin_.right, bin_.share, bin_.pairs]
        for one in groups
        for bin_ in one.calibration.bins
    ]
    return ["pairs of", "from", "to", "confidence", "share right", "share of pairs", "pairs"], rows


def length_parts(card: ReportCard) -> dict[str, Accuracy]:
    """What there is to compare with the rule "the longer answer wins"; the rest is of the scores."""
    if card.length is None or card.overall is None:
        return {}
    parts = {
        "rule: longer wins": card.length.longer_wins,
        "scores: all pairs": card.overall.accuracy,
        f"lengths within {SAME_LENGTH:.0%}": card.length.controlled,
        "better is longer": card.length.better_is_longer,
        "better is shorter": card.length.better_is_shorter,
    }
    return {name: one for name, one in parts.items() if one is not None}


def _length(card: ReportCard) -> Table:
    return ["measured on", *ACCURACY], [[name, *_measured(one)] for name, one in length_parts(card).items()]


def _position(card: ReportCard) -> Table:
    parts = {f"score read at {one.low:,} to {one.high:,} tokens": one.accuracy for one in card.positions}
    parts |= {
        name: one
        for name, one in (("prompt cut", card.cut), ("prompt not cut", card.uncut))
        if one and card.cut
    }
    return ["place", *ACCURACY], [[name, *_measured(one)] for name, one in parts.items()]


def _scores(card: ReportCard) -> Table:
    sides = {"better": card.scores.better, "worse": card.scores.worse} if card.scores else {}
    rows = [[name, one.mean, one.deviation, *one.quantiles] for name, one in sides.items()]
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
        [one.index, one.margin, text.condition, text.origin, text.prompt, text.chosen, text.rejected]
        if (text := one.text)
        else [one.index, one.margin, None, None, None, None, None]
        for one in card.worst
    ]
    return ["pair", "margin", "condition", "origin", "prompt", "better", "worse"], rows
