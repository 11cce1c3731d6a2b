"""The report card of a reward model: accuracy, calibration, controls, length bias and distribution of its scores.

Pure functions of scored pairs. Bad scores raise nothing: `verdict.py` puts what is wrong into sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from tuner.evaluation.report_card.measures import (
    Accuracy,
    Calibration,
    Difference,
    accuracy,
    calibration,
    difference,
    quantile_bins,
    twins_right,
)
from tuner.evaluation.report_card.pairs import PairText, ScoredPairs
from tuner.evaluation.report_card.verdict import assess
from tuner.rollout.correlation import pearson, spearman

SEEN = "seen"
CONTROLS = ("unseen", "novel", "blank", "swapped")
"""In order: untrained wordings with a trained key word; wordings that share no word with trained ones; no condition;
the wording of another condition."""
NO_CONDITION = "(none)"
SAME_LENGTH = 0.10
"""Pairs are length-controlled where the lengths differ by at most this share of the longer answer."""
QUANTILES = (0.01, 0.05, 0.50, 0.95, 0.99)
HISTOGRAM_BINS, POSITION_BINS, LENGTH_BINS = 40, 4, 8


@dataclass(frozen=True)
class Group:
    """Measures of the pairs of one condition or one source, or of all pairs."""

    name: str
    accuracy: Accuracy
    margin: float
    """Mean of better score - worse score."""
    calibration: Calibration
    controls: dict[str, float]
    """Control -> accuracy of these pairs under it; filled for conditions only."""


@dataclass(frozen=True)
class Ranking:
    """The two figures by which a group is compared before and after a change of the model."""

    accuracy: float
    """Share of pairs in the right order."""
    margin: float
    """Mean of better score - worse score."""
    rows: int

    @classmethod
    def of(cls, group: Group) -> Self:
        return cls(group.accuracy.value, group.margin, group.accuracy.rows)


@dataclass(frozen=True)
class Control:
    """Measures under one control. The first of the card is "seen": each row's condition in a trained wording."""

    name: str
    accuracy: Accuracy
    twins: float | None
    """Share of groups of twins in which all are right; None where there are no twins."""
    gain: Difference | None
    """Accuracy under "seen" minus accuracy under this control, on the same pairs; None for "seen" itself."""
    changed: float | None
    """Share of pairs with another winner than under "seen"; None for "seen" itself."""


@dataclass(frozen=True)
class Controls:
    """All controls, measured on the same pairs so that they can be compared."""

    over: str
    """Which pairs: "twins" where there are any, else "conditions" (rows that name one), else "all".

    Twins come first for their known baseline: without a condition exactly half are right, and never both twins."""
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
    """Length bias: how far scores follow the lengths of answers, better and worse together."""

    pearson: float | None
    spearman: float | None
    longer_wins: Accuracy
    """Accuracy of the rule "the longer answer wins", on the same pairs."""
    rule: str
    """The better rule for these pairs: "longer" or "shorter"."""
    gain: Difference
    """Accuracy of the scores minus that of `rule`."""
    controlled: Accuracy | None
    """Accuracy of the scores on pairs of about equal lengths (SAME_LENGTH)."""
    better_is_longer: Accuracy | None
    better_is_shorter: Accuracy | None
    curve: tuple[LengthBin, ...]


@dataclass(frozen=True)
class PositionBin:
    """Accuracy of the pairs whose scores were read at tokens low to high (inclusive) of their sequences."""

    low: int
    high: int
    accuracy: Accuracy


@dataclass(frozen=True)
class ScoreStatistics:
    """Mean, standard deviation and QUANTILES of scores."""

    mean: float
    deviation: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Distribution:
    """Distributions of the scores of better and worse answers; an answer of several pairs counts in each."""

    bound: float | None
    outside: float | None
    """Share of scores beyond ±bound; None where scores are not bounded."""
    better: ScoreStatistics
    worse: ScoreStatistics
    edges: tuple[float, ...]
    better_counts: tuple[int, ...]
    worse_counts: tuple[int, ...]


@dataclass(frozen=True)
class WorstPair:
    """A pair that the scores put in the wrong order, among those with the largest gaps."""

    index: int
    margin: float
    text: PairText | None


@dataclass(frozen=True)
class ReportCard:
    """The whole report card. Parts without pairs are None or empty."""

    overall: Group | None
    conditions: tuple[Group, ...]
    """Empty where no row names a condition."""
    sources: tuple[Group, ...]
    controls: Controls | None
    length: Length | None
    positions: tuple[PositionBin, ...]
    cut: Accuracy | None
    """Accuracy on rows whose prompt was truncated."""
    uncut: Accuracy | None
    """Accuracy on rows whose prompt was not truncated."""
    scores: Distribution | None
    worst: tuple[WorstPair, ...]
    broken: int
    """Pairs left out because a score of theirs is not finite, under any control."""
    verdict: tuple[str, ...] = ()
    """What is wrong, one sentence per fault; empty where nothing is."""
    failed: bool = False
    """Whether a fault makes the model unusable: see `verdict.assess`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values without NaN, for JSON; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReportCard:
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(values)


def make_card(
    seen: ScoredPairs,
    controls: Mapping[str, ScoredPairs],
    *,
    bound: float | None,
    texts: Callable[[int], PairText] | None = None,
    worst: int = 20,
) -> ReportCard:
    """The report card of held-out pairs.

    seen: pairs scored under the condition that each row names, in trained wordings; rows may name none. controls: the
    same pairs in the same order, scored again, under any of the names in CONTROLS. bound: scores should lie within
    ±bound (None = unbounded). texts: index of a pair -> its texts. worst: how many of the worst pairs to list.
    Raises ValueError for an unknown control, and for a control with another number of pairs.
    """
    for name, pairs in controls.items():
        if name not in CONTROLS or len(pairs) != len(seen):
            raise ValueError(f"control {name!r} has {len(pairs)} pairs for {len(seen)}; known: {CONTROLS}")
    # A pair broken under one control is left out of all: they are compared on the same pairs.
    finite = np.logical_and.reduce([seen.finite, *(pairs.finite for pairs in controls.values())])
    index, total = np.flatnonzero(finite), len(seen)
    seen = seen.select(finite)
    controls = {name: controls[name].select(finite) for name in CONTROLS if name in controls}
    named = np.array([name or NO_CONDITION for name in seen.conditions], dtype=object)
    sources = np.array(seen.sources, dtype=object)
    cut = seen.cut.astype(bool)
    card = ReportCard(
        overall=_group("all", seen, {}) if len(seen) else None,
        conditions=_groups(named, seen, controls) if any(seen.conditions) else (),
        sources=_groups(sources, seen, {}),
        controls=_controls(seen, controls),
        length=_length(seen),
        positions=tuple(
            _position_bin(seen.select(inside)) for inside in quantile_bins(seen.positions, POSITION_BINS)
        ),
        cut=accuracy(seen.select(cut)),
        uncut=accuracy(seen.select(~cut)),
        scores=_distribution(seen, bound),
        worst=tuple(_worst(seen.margins, index, texts, worst)),
        broken=total - len(seen),
    )
    verdict, failed = assess(card)
    return replace(card, verdict=verdict, failed=failed)


def _groups(names: np.ndarray, seen: ScoredPairs, controls: Mapping[str, ScoredPairs]) -> tuple[Group, ...]:
    groups = []
    for name in sorted(set(names.tolist())):
        inside = names == name
        others = {control: pairs.select(inside) for control, pairs in controls.items()}
        groups.append(_group(name, seen.select(inside), others))
    return tuple(groups)


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


def _controls(seen: ScoredPairs, controls: Mapping[str, ScoredPairs]) -> Controls | None:
    """All controls on the pairs with a twin; without twins on those with a condition, else on all."""
    if not len(seen):
        return None
    conditioned = np.array([bool(name) for name in seen.conditions])
    over, inside = "all", np.ones(len(seen), dtype=bool)
    if seen.with_twin.any():
        over, inside = "twins", seen.with_twin
    elif conditioned.any():
        over, inside = "conditions", conditioned
    baseline = seen.select(inside)
    rows = []
    for name, scored in {SEEN: seen, **controls}.items():
        pairs = scored.select(inside)
        right = accuracy(pairs)
        assert right is not None
        gain = changed = None
        if name != SEEN:
            gain = difference(baseline, baseline.right, pairs.right)
            changed = float(np.average(pairs.right != baseline.right, weights=baseline.weights))
        rows.append(Control(name, right, twins_right(pairs), gain, changed))
    return Controls(over, len(np.unique(baseline.twins)) if over == "twins" else 0, tuple(rows))


def _length(pairs: ScoredPairs) -> Length | None:
    longer_wins = accuracy(pairs, pairs.longer)
    if longer_wins is None:
        return None
    tokens = np.concatenate([pairs.chosen_tokens, pairs.rejected_tokens])
    scores, weights = np.concatenate([pairs.chosen, pairs.rejected]), np.tile(pairs.weights, 2)
    # Compared with the better of the two rules: short answers may win a data set as well.
    rule = "longer" if longer_wins.value >= 0.5 else "shorter"
    gain = difference(pairs, pairs.right, pairs.longer if rule == "longer" else 1 - pairs.longer)
    assert gain is not None
    longest = np.maximum(pairs.chosen_tokens, pairs.rejected_tokens)
    same = np.abs(pairs.chosen_tokens - pairs.rejected_tokens) <= SAME_LENGTH * longest
    return Length(
        pearson=pearson(tokens, scores, weights),
        spearman=spearman(tokens, scores, weights),
        longer_wins=longer_wins,
        rule=rule,
        gain=gain,
        controlled=accuracy(pairs.select(same)),
        better_is_longer=accuracy(pairs.select(pairs.longer == 1)),
        better_is_shorter=accuracy(pairs.select(pairs.longer == 0)),
        curve=tuple(
            LengthBin(float(tokens[inside].mean()), float(scores[inside].mean()), int(inside.sum()))
            for inside in quantile_bins(tokens, LENGTH_BINS)
        ),
    )


def _position_bin(pairs: ScoredPairs) -> PositionBin:
    right = accuracy(pairs)
    assert right is not None
    return PositionBin(int(pairs.positions.min()), int(pairs.positions.max()), right)


def _distribution(pairs: ScoredPairs, bound: float | None) -> Distribution | None:
    if not len(pairs):
        return None
    scores = np.concatenate([pairs.chosen, pairs.rejected])
    edges = np.histogram_bin_edges(scores, HISTOGRAM_BINS)
    return Distribution(
        bound=bound,
        outside=None if bound is None else float(np.mean(np.abs(scores) > bound)),
        better=_statistics(pairs.chosen),
        worse=_statistics(pairs.rejected),
        edges=tuple(edges.tolist()),
        better_counts=tuple(np.histogram(pairs.chosen, edges)[0].tolist()),
        worse_counts=tuple(np.histogram(pairs.rejected, edges)[0].tolist()),
    )


def _statistics(scores: np.ndarray) -> ScoreStatistics:
    return ScoreStatistics(
        float(scores.mean()), float(scores.std()), tuple(np.quantile(scores, QUANTILES).tolist())
    )


def _worst(
    margins: np.ndarray, index: np.ndarray, texts: Callable[[int], PairText] | None, most: int
) -> list[WorstPair]:
    """At most `most` pairs of negative margin, worst first; index: places of the pairs among those of the caller."""
    order = [at for at in np.argsort(margins, kind="stable")[:most] if margins[at] < 0]
    return [
        WorstPair(int(index[at]), float(margins[at]), texts(int(index[at])) if texts else None)
        for at in order
    ]
