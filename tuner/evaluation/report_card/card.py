"""The report card of a reward model: how good its scores are, under which controls, and what is wrong with them.

Pure functions of scored pairs. It refuses nothing; what is wrong is said in sentences (`verdict.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tuner.evaluation.report_card.measures import (
    Accuracy,
    Calibration,
    Difference,
    accuracy,
    calibration,
    difference,
    pearson,
    quantile_bins,
    spearman,
    twins_right,
)
from tuner.evaluation.report_card.pairs import PairText, ScoredPairs
from tuner.evaluation.report_card.verdict import judge

SEEN = "seen"
CONTROLS = ("unseen", "novel", "blank", "swapped")
"""Wordings never trained (key word known); no word shared with trained ones; no condition; another condition's."""
NO_CONDITION = "(none)"
SAME_LENGTH = 0.10
"""Answers whose lengths differ by no more of the longer one are length-controlled."""
QUANTILES = (0.01, 0.05, 0.50, 0.95, 0.99)
HISTOGRAM_BINS, POSITION_BINS, LENGTH_BINS = 40, 4, 8


@dataclass(frozen=True)
class Group:
    """Pairs that have something in common."""

    name: str
    accuracy: Accuracy
    margin: float
    """Mean of better - worse."""
    calibration: Calibration
    controls: dict[str, float]
    """Accuracy of these pairs under each control (conditions only): what naming the condition is worth."""


@dataclass(frozen=True)
class Control:
    """The pairs scored under one control; the first is "seen", the condition that each row names."""

    name: str
    accuracy: Accuracy
    twins: float | None
    """Share of groups of twins in which all are right; None where there are no twins."""
    gain: Difference | None
    """How much better "seen" is on the same pairs; None for "seen" itself."""
    changed: float | None
    """Share of pairs whose winner is another than under "seen"; None for "seen" itself."""


@dataclass(frozen=True)
class Controls:
    """All controls on the same pairs, so that they can be compared."""

    over: str
    """Which: "twins" where there are any (without a condition exactly half of these are right, and no twins both),
    else "conditions" (rows that name one), else "all"."""
    twin_groups: int
    rows: tuple[Control, ...]


@dataclass(frozen=True)
class LengthBin:
    """Answers of similar length: their mean length in tokens and mean score."""

    tokens: float
    score: float
    answers: int


@dataclass(frozen=True)
class Length:
    """Whether scores follow the length of answers. Correlations are over all answers, better and worse."""

    pearson: float | None
    spearman: float | None
    longer_wins: Accuracy
    """Of the rule "the longer answer wins", on the same pairs."""
    rule: str
    """The better rule for these pairs: "longer" or "shorter"."""
    gain: Difference
    """How much better the scores are than that rule."""
    controlled: Accuracy | None
    """Of the scores on pairs whose answers are about as long (SAME_LENGTH)."""
    better_is_longer: Accuracy | None
    better_is_shorter: Accuracy | None
    curve: tuple[LengthBin, ...]


@dataclass(frozen=True)
class Place:
    """Pairs by a place in the sequence: accuracy where the score was read at tokens low..high (inclusive)."""

    low: int
    high: int
    accuracy: Accuracy


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and QUANTILES of scores."""

    mean: float
    deviation: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Distribution:
    """Scores of better and worse answers; one that stands in several pairs counts in each."""

    bound: float | None
    outside: float | None
    """Share of scores beyond ±bound; None where scores are not bounded."""
    better: Spread
    worse: Spread
    edges: tuple[float, ...]
    better_counts: tuple[int, ...]
    worse_counts: tuple[int, ...]


@dataclass(frozen=True)
class WorstPair:
    """A pair in the wrong order by much; texts where they were given."""

    index: int
    margin: float
    text: PairText | None


@dataclass(frozen=True)
class ReportCard:
    """All of it. Parts without pairs are None or empty."""

    overall: Group | None
    conditions: tuple[Group, ...]
    """Empty where no row names one."""
    sources: tuple[Group, ...]
    controls: Controls | None
    length: Length | None
    positions: tuple[Place, ...]
    cut: Accuracy | None
    """Rows whose prompt was truncated."""
    uncut: Accuracy | None
    scores: Distribution | None
    worst: tuple[WorstPair, ...]
    broken: int
    """Pairs left out because a score is not a finite number, under any control."""
    verdict: tuple[str, ...] = ()
    """What is wrong, a sentence each; empty = nothing was found."""
    failed: bool = False
    """Not better than chance or than length, conditions ignored, or scores that are not numbers."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values without NaN, for JSON; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReportCard:
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(values)


def make_card(
    asked: ScoredPairs,
    controls: Mapping[str, ScoredPairs],
    *,
    bound: float | None,
    texts: Callable[[int], PairText] | None = None,
    worst: int = 20,
) -> ReportCard:
    """The report card of held-out pairs.

    `asked` is scored under the condition that each row names, in wordings of the training (rows may name none);
    `controls` holds the same pairs in the same order, scored again, under any of the names in CONTROLS.
    `bound` is the ±limit of scores (None = unbounded); `texts` gives the texts of a pair of `asked` by index.
    Raises ValueError for an unknown control or one of another length.
    """
    for name, pairs in controls.items():
        if name not in CONTROLS or len(pairs) != len(asked):
            raise ValueError(f"control {name!r} has {len(pairs)} pairs for {len(asked)}; known: {CONTROLS}")
    finite = np.logical_and.reduce([asked.finite, *(pairs.finite for pairs in controls.values())])
    index, whole = np.flatnonzero(finite), len(asked)
    asked = asked.select(finite)
    controls = {name: controls[name].select(finite) for name in CONTROLS if name in controls}
    named = np.array([name or NO_CONDITION for name in asked.conditions], dtype=object)
    sources = np.array(asked.sources, dtype=object)
    cut = asked.cut.astype(bool)
    card = ReportCard(
        overall=_group("all", asked, {}) if len(asked) else None,
        conditions=_groups(named, asked, controls) if any(asked.conditions) else (),
        sources=_groups(sources, asked, {}),
        controls=_controls(asked, controls),
        length=_length(asked),
        positions=tuple(
            _place(asked.select(inside)) for inside in quantile_bins(asked.positions, POSITION_BINS)
        ),
        cut=accuracy(asked.select(cut)),
        uncut=accuracy(asked.select(~cut)),
        scores=_distribution(asked, bound),
        worst=tuple(_worst(asked.margins, index, texts, worst)),
        broken=whole - len(asked),
    )
    verdict, failed = judge(card)
    return replace(card, verdict=verdict, failed=failed)


def _groups(names: np.ndarray, asked: ScoredPairs, controls: Mapping[str, ScoredPairs]) -> tuple[Group, ...]:
    found = []
    for name in sorted(set(names.tolist())):
        inside = names == name
        others = {control: pairs.select(inside) for control, pairs in controls.items()}
        found.append(_group(name, asked.select(inside), others))
    return tuple(found)


def _group(name: str, pairs: ScoredPairs, controls: Mapping[str, ScoredPairs]) -> Group:
    right, calibrated = accuracy(pairs), calibration(pairs)
    assert right is not None
    assert calibrated is not None
    return Group(
        name=name,
        accuracy=right,
        margin=float(np.average(pairs.margins, weights=pairs.weights)),
        calibration=calibrated,
        controls={
            control: float(np.average(scored.right, weights=pairs.weights))
            for control, scored in controls.items()
        },
    )


def _controls(asked: ScoredPairs, controls: Mapping[str, ScoredPairs]) -> Controls | None:
    """All on the same pairs: those with a twin, or else those with a condition, or else all."""
    if not len(asked):
        return None
    conditioned = np.array([bool(name) for name in asked.conditions])
    over, inside = "all", np.ones(len(asked), dtype=bool)
    if asked.with_twin.any():
        over, inside = "twins", asked.with_twin
    elif conditioned.any():
        over, inside = "conditions", conditioned
    seen = asked.select(inside)
    rows = []
    for name, whole in {SEEN: asked, **controls}.items():
        pairs = whole.select(inside)
        right = accuracy(pairs)
        assert right is not None
        gain = changed = None
        if name != SEEN:
            gain = difference(seen, seen.right, pairs.right)
            changed = float(np.average(pairs.right != seen.right, weights=seen.weights))
        rows.append(Control(name, right, twins_right(pairs), gain, changed))
    return Controls(over, len(np.unique(seen.twins)) if over == "twins" else 0, tuple(rows))


def _length(asked: ScoredPairs) -> Length | None:
    longer_wins = accuracy(asked, asked.longer)
    if longer_wins is None:
        return None
    tokens = np.concatenate([asked.chosen_tokens, asked.rejected_tokens])
    scores, weights = np.concatenate([asked.chosen, asked.rejected]), np.tile(asked.weights, 2)
    rule = "longer" if longer_wins.value >= 0.5 else "shorter"
    gain = difference(asked, asked.right, asked.longer if rule == "longer" else 1 - asked.longer)
    assert gain is not None
    longest = np.maximum(asked.chosen_tokens, asked.rejected_tokens)
    same = np.abs(asked.chosen_tokens - asked.rejected_tokens) <= SAME_LENGTH * longest
    return Length(
        pearson=pearson(tokens, scores, weights),
        spearman=spearman(tokens, scores, weights),
        longer_wins=longer_wins,
        rule=rule,
        gain=gain,
        controlled=accuracy(asked.select(same)),
        better_is_longer=accuracy(asked.select(asked.longer == 1)),
        better_is_shorter=accuracy(asked.select(asked.longer == 0)),
        curve=tuple(
            LengthBin(float(tokens[inside].mean()), float(scores[inside].mean()), int(inside.sum()))
            for inside in quantile_bins(tokens, LENGTH_BINS)
        ),
    )


def _place(pairs: ScoredPairs) -> Place:
    right = accuracy(pairs)
    assert right is not None
    return Place(int(pairs.positions.min()), int(pairs.positions.max()), right)


def _distribution(asked: ScoredPairs, bound: float | None) -> Distribution | None:
    if not len(asked):
        return None
    scores = np.concatenate([asked.chosen, asked.rejected])
    edges = np.histogram_bin_edges(scores, HISTOGRAM_BINS)
    return Distribution(
        bound=bound,
        outside=None if bound is None else float(np.mean(np.abs(scores) > bound)),
        better=_spread(asked.chosen),
        worse=_spread(asked.rejected),
        edges=tuple(edges.tolist()),
        better_counts=tuple(np.histogram(asked.chosen, edges)[0].tolist()),
        worse_counts=tuple(np.histogram(asked.rejected, edges)[0].tolist()),
    )


def _spread(scores: np.ndarray) -> Spread:
    return Spread(float(scores.mean()), float(scores.std()), tuple(np.quantile(scores, QUANTILES).tolist()))


def _worst(
    margins: np.ndarray, index: np.ndarray, texts: Callable[[int], PairText] | None, most: int
) -> list[WorstPair]:
    """The largest negative margins, worst first; `index` tells which pair each was before any was left out."""
    order = [at for at in np.argsort(margins, kind="stable")[:most] if margins[at] < 0]
    return [
        WorstPair(int(index[at]), float(margins[at]), texts(int(index[at])) if texts else None)
        for at in order
    ]
