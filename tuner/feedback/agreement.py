"""How far annotators agree: chance-corrected coefficients, and the figures of a set of labels.

Values are compared as they are (nominal). A coefficient is NaN where chance alone would agree always: one value only.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from tuner.feedback.candidates import Candidate, Decision
from tuner.feedback.store import Label

_DRAWS = 1000
"""Bootstrap samples of an interval."""


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's kappa (1960) of two annotators' values of the same items: (observed - expected) / (1 - expected)."""
    count = len(first)
    if count == 0:
        return math.nan
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / count
    totals = Counter(first), Counter(second)
    expected = sum(totals[0][value] * totals[1][value] for value in totals[0]) / count**2
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float:
    """Krippendorff's alpha for nominal values.

    units: the values of each item, from any number of annotators; items with one value do not count. Formula:
    Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C.
    """
    return float(_alpha(_coincidences(units).sum(axis=0)[None])[0])


def alpha_interval(units: Sequence[Sequence[Hashable]], seed: int = 0) -> tuple[float, float]:
    """95% interval of alpha, by the percentiles of a bootstrap over items; NaN with fewer than two items.

    Samples in which alpha is undefined are left out.
    """
    coincidences_UVV = _coincidences(units)
    count = len(coincidences_UVV)
    if count < 2:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    times_DU = random.multinomial(count, np.full(count, 1 / count), size=_DRAWS)
    alphas_D = _alpha(np.einsum("du,uvw->dvw", times_DU, coincidences_UVV))
    alphas_D = alphas_D[~np.isnan(alphas_D)]
    if not len(alphas_D):
        return math.nan, math.nan
    low, high = np.quantile(alphas_D, (0.025, 0.975))
    return float(low), float(high)


def _coincidences(units: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """The coincidence matrix of each unit with two values or more, float64 [U, V, V]."""
    values = list(dict.fromkeys(value for unit in units for value in unit))
    paired = [unit for unit in units if len(unit) > 1]
    coincidences_UVV = np.zeros((len(paired), len(values), len(values)))
    for matrix_VV, unit in zip(coincidences_UVV, paired, strict=True):
        counts_V = np.array([list(unit).count(value) for value in values], dtype=float)
        matrix_VV += (np.outer(counts_V, counts_V) - np.diag(counts_V)) / (len(unit) - 1)
    return coincidences_UVV


def _alpha(coincidences_DVV: np.ndarray) -> np.ndarray:
    """Alpha of each coincidence matrix, float64 [D]: 1 - observed / expected disagreement."""
    totals_DV = coincidences_DVV.sum(axis=2)
    count_D = totals_DV.sum(axis=1)
    disagreement_D = count_D - np.trace(coincidences_DVV, axis1=1, axis2=2)
    expected_D = count_D**2 - (totals_DV**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected_D > 0, 1 - (count_D - 1) * disagreement_D / expected_D, np.nan)


@dataclass(frozen=True)
class Figures:
    """The figures of some labels. Shares and coefficients are NaN where nothing can be computed."""

    labels: int
    """Without repeats."""
    ties: int
    skips: int
    unsure: int
    comments: int
    left: float
    """Share of "left" among left and right, of labels given on our page: far from 0.5 is a habit, for its order is
    random."""
    self_agreement: float
    """Share of repeated pairs that got the same decision again."""
    repeated: int
    gold_accuracy: float
    """Share of right decisions on planted pairs; unsure is none."""
    gold: int
    median_seconds: float
    """Of labels given on our page."""
    alpha: float
    """Krippendorff's, of first, second and tie; NaN for one annotator alone."""
    alpha_low: float
    alpha_high: float
    overlapping: int
    """Pairs that two annotators or more decided."""


def figures(labels: Sequence[Label], candidates: Mapping[str, Candidate], seed: int = 0) -> Figures:
    """The figures of labels, of any annotators and conditions. Each label's item must be in `candidates`."""
    firsts = [label for label in labels if not label.repeat]
    choices = Counter(label.choice for label in firsts)
    # programs and other tools may show a fixed order, and their sides are the row's
    on_page = [label for label in labels if label.on_page]
    sides = [label.choice for label in on_page if not label.repeat and label.choice in ("left", "right")]
    kept = _repeated(labels)
    gold = [label.decision == candidates[label.item].gold for label in firsts if _is_gold(label, candidates)]
    units = [unit for unit in decisions_by_item(labels).values() if len(unit) > 1]
    low, high = alpha_interval(list(map(_values, units)), seed)
    return Figures(
        labels=len(firsts),
        ties=choices["tie"],
        skips=choices["skip"],
        unsure=choices["unsure"],
        comments=sum(bool(label.comment) for label in labels),
        left=_mean([side == "left" for side in sides]),
        self_agreement=_mean(kept),
        repeated=len(kept),
        gold_accuracy=_mean(gold),
        gold=len(gold),
        median_seconds=median([label.seconds for label in on_page]) if on_page else math.nan,
        alpha=krippendorff_alpha(list(map(_values, units))),
        alpha_low=low,
        alpha_high=high,
        overlapping=len(units),
    )


def decisions_by_item(labels: Sequence[Label]) -> dict[str, dict[str, Decision]]:
    """Item -> annotator -> decision, without repeats and labels that decide nothing."""
    decisions: dict[str, dict[str, Decision]] = defaultdict(dict)
    for label in labels:
        if label.decision is not None and not label.repeat:
            decisions[label.item][label.annotator] = label.decision
    return dict(decisions)


def report(labels: Sequence[Label], candidates: Mapping[str, Candidate], seed: int = 0) -> dict[str, Any]:
    """The figures as JSON: of all labels, per condition, per annotator and per both; and kappa of every two annotators.

    {"groups": [{"condition", "annotator", ...Figures}], "pairs": [{"condition", "annotators", "items", "kappa"}]}; None
    stands for all conditions or annotators, and for numbers that cannot be computed. Labels of items that are not in
    `candidates` are left out.
    """
    labels = [label for label in labels if label.item in candidates]
    named = {candidate.condition for candidate in candidates.values()} - {None}
    conditions = [None, *sorted(filter(None, named))]
    annotators = sorted({label.annotator for label in labels})
    groups: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for condition in conditions:
        there = [label for label in labels if condition in (None, candidates[label.item].condition)]
        for annotator in (None, *annotators):
            own = [label for label in there if annotator in (None, label.annotator)]
            numbers = {name: _number(value) for name, value in asdict(figures(own, candidates, seed)).items()}
            groups.append({"condition": condition, "annotator": annotator, **numbers})
        decisions = decisions_by_item(there)
        for two in combinations(annotators, 2):
            both = [unit for unit in decisions.values() if unit.keys() >= set(two)]
            kappa = cohen_kappa(*([unit[name] for unit in both] for name in two))
            pairs.append(
                {"condition": condition, "annotators": two, "items": len(both), "kappa": _number(kappa)}
            )
    return {"groups": groups, "pairs": pairs}


def _repeated(labels: Sequence[Label]) -> list[bool]:
    """Of each pair that an annotator decided twice, whether both decisions are the same."""
    twice: dict[tuple[str, str], list[Decision]] = defaultdict(list)
    for label in labels:
        if label.decision is not None:
            twice[label.annotator, label.item].append(label.decision)
    return [both[0] == both[1] for both in twice.values() if len(both) == 2]


def _is_gold(label: Label, candidates: Mapping[str, Candidate]) -> bool:
    return candidates[label.item].gold is not None and label.choice != "skip"


def _values(unit: Mapping[str, Decision]) -> list[Decision]:
    return list(unit.values())


def _mean(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else math.nan


def _number(value: float) -> float | None:
    """NaN has no JSON."""
    return None if math.isnan(value) else value
