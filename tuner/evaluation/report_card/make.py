"""A reward model's report card from its run: held-out rows asked about in every way, and scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tuner.config import FocalRanking, PairEvaluation, Preferences
from tuner.data.comparisons import Comparisons
from tuner.data.conditions import CONTROLS, Conditions, Presentation
from tuner.data.load_preferences import load_test_preferences
from tuner.data.subset import stratified_indices
from tuner.evaluation.report_card.card import ReportCard, make_card
from tuner.evaluation.report_card.pairs import PairText, ScoredPairs
from tuner.models.reward_record import Reference

Scoring = Callable[[Comparisons], np.ndarray]
"""Scores of all answers, float64 [N]."""


@dataclass(frozen=True)
class ReportSettings:
    """The parts of a reward model's config that its report card depends on."""

    data: Preferences
    reward_token: str | None
    evaluation: PairEvaluation
    loss: FocalRanking


def report_on(
    settings: ReportSettings, tokenizer: object, conditions: Conditions, score: Scoring
) -> tuple[ReportCard, Reference] | None:
    """The report card of the test rows, and the distribution of their scores; None without test rows.

    conditions: those of the config, asked about as they were trained.
    """

    def load(presentation: Presentation) -> Comparisons | None:
        return load_test_preferences(
            settings.data,
            tokenizer,  # type: ignore[arg-type]
            replace(conditions, presentation=presentation),
            settings.reward_token,
        )

    whole = load("seen")
    if whole is None:
        return None
    conditions = replace(conditions, partners=_partners(whole))
    places = stratified_indices(whole, settings.evaluation.rows)
    comparisons = whole.take(places)
    scores = score(comparisons)
    controls: dict[str, ScoredPairs] = {}
    for control in CONTROLS:
        if _can_present(conditions, control):
            asked = load(control)
            assert asked is not None
            asked = asked.take(places)
            controls[control] = scored_pairs(asked, score(asked), settings)
    card = make_card(
        scored_pairs(comparisons, scores, settings),
        controls,
        bound=settings.loss.bound if settings.loss.barrier and settings.loss.penalty == "log" else None,
        texts=lambda pair: _texts(comparisons, pair, tokenizer),
        worst=settings.evaluation.worst,
    )
    finite = scores[np.isfinite(scores)]
    return card, Reference(float(finite.mean()), float(finite.std()), len(finite))


def scored_pairs(comparisons: Comparisons, scores: np.ndarray, settings: ReportSettings) -> ScoredPairs:
    """The pairs of some rows with the scores of their answers; answers of equal rank make none."""
    counts = np.diff(comparisons.pair_offsets)
    rows = np.repeat(np.arange(len(comparisons)), counts)
    better, worse = (comparisons.offsets[rows] + side for side in (comparisons.better, comparisons.worse))
    totals = np.bincount(rows, comparisons.weights, minlength=len(comparisons))
    sequences, paths = comparisons.sequences, _paths(settings.data)
    # a reward token, where there is one, is no part of the answer
    tokens = sequences.lengths - comparisons.starts - (settings.reward_token is not None)
    return ScoredPairs(
        chosen=scores[better],
        rejected=scores[worse],
        weights=comparisons.weights / totals[rows],
        rows=rows,
        conditions=tuple(comparisons.condition(row) or "" for row in rows),
        sources=tuple(paths[comparisons.sources[row]] for row in rows),
        chosen_tokens=tokens[better],
        rejected_tokens=tokens[worse],
        positions=sequences.lengths[better],
        cut=comparisons.cut[rows],
        twins=_twins(comparisons)[rows],
    )


def _paths(data: Preferences) -> list[str]:
    return [source.path for source in (*data.sources, *data.validation_sources, *data.test_sources)]


def _twins(comparisons: Comparisons) -> np.ndarray:
    """int64 [R]: number of the twins a row is one of: the same pair, preferred the other way round; else -1."""
    best = np.array(
        [_answer(comparisons, int(first)).tobytes() for first in comparisons.offsets[:-1]], dtype=object
    )
    twins = np.full(len(comparisons), -1)
    groups: dict[int, list[int]] = {}
    for row, twin in enumerate(comparisons.twins.tolist()):
        groups.setdefault(twin, []).append(row)
    for number, rows in enumerate(groups.values()):
        if len(rows) > 1 and len({best[row] for row in rows}) > 1:
            twins[rows] = number
    return twins


def _partners(comparisons: Comparisons) -> dict[str, str]:
    """Each condition with the one put in its place when they are swapped: of its twins, or else the next one."""
    names = [
        name for place, name in enumerate(comparisons.condition_names) if place in comparisons.conditions
    ]
    partners = {name: names[(place + 1) % len(names)] for place, name in enumerate(names)}
    twins, met = _twins(comparisons), {}
    for row in np.flatnonzero(twins >= 0).tolist():
        met.setdefault(twins[row], set()).add(comparisons.condition(row))
    for pair in met.values():
        if len(pair) == 2 and None not in pair:
            one, other = sorted(pair)
            partners |= {one: other, other: one}
    return partners


def _can_present(conditions: Conditions, presentation: Presentation) -> bool:
    """Whether every condition of the rows has such wordings, or a partner; one alone cannot be swapped."""
    used = list(conditions.partners)
    if presentation == "swapped":
        return len(used) > 1
    if presentation == "blank":
        return bool(used)
    return bool(used) and all(conditions.wordings[name].texts(presentation) for name in used)


def _answer(comparisons: Comparisons, sequence: int) -> np.ndarray:
    return comparisons.sequences.example(sequence)[0][comparisons.starts[sequence] :]


def _texts(comparisons: Comparisons, pair: int, tokenizer: object) -> PairText:
    row = int(np.searchsorted(comparisons.pair_offsets, pair, side="right")) - 1
    sides = [int(comparisons.offsets[row] + side[pair]) for side in (comparisons.better, comparisons.worse)]
    prompt = comparisons.sequences.example(sides[0])[0][: comparisons.starts[sides[0]]]
    decode = tokenizer.decode  # type: ignore[attr-defined]
    chosen, rejected = (
        decode(_answer(comparisons, side), skip_special_tokens=True).strip() for side in sides
    )
    return PairText(
        decode(prompt), chosen, rejected, comparisons.condition(row) or "", comparisons.origin(row)
    )
