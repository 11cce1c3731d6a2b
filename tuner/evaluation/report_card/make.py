"""A reward model's report card from its run: held-out rows scored under their conditions and under every control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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
"""Rows -> the scores of all their answers, float64 [N]."""
Scorings = Callable[[int], AbstractContextManager[Scoring]]
"""Number of answers to be scored in all -> a context in which they are."""


@dataclass(frozen=True)
class ReportSettings:
    """The parts of a reward model's config that its report card depends on."""

    data: Preferences
    reward_token: str | None
    evaluation: PairEvaluation
    loss: FocalRanking


def report_on(
    settings: ReportSettings,
    tokenizer: object,
    conditions: Conditions,
    scoring: Scorings,
    *,
    controls: Sequence[Presentation] = CONTROLS,
) -> tuple[ReportCard, Reference] | None:
    """The report card of the test rows, and the mean and standard deviation of their scores; None without test rows.

    conditions: the config's, in their trained wordings. controls: those to measure, of which every one scores all rows
    again.
    """

    def load(control: Presentation) -> Comparisons | None:
        return load_test_preferences(
            settings.data,
            tokenizer,  # type: ignore[arg-type]
            replace(conditions, presentation=control),
            settings.reward_token,
        )

    test_rows = load("seen")
    if test_rows is None:
        return None
    conditions = replace(conditions, partners=_partners(test_rows))
    places = stratified_indices(test_rows, settings.evaluation.rows)
    comparisons = test_rows.take(places)
    applicable: list[Presentation] = [control for control in controls if _can_apply(conditions, control)]
    by_control: dict[str, ScoredPairs] = {}
    with scoring(len(comparisons.sequences) * (1 + len(applicable))) as score:
        scores = score(comparisons)
        for control in applicable:
            # Loaded again: a control's wording changes the prompts' tokens, and so what is truncated.
            rows = load(control)
            assert rows is not None
            rows = rows.take(places)
            by_control[control] = scored_pairs(rows, score(rows), settings)
    card = make_card(
        scored_pairs(comparisons, scores, settings),
        by_control,
        bound=settings.loss.bound if settings.loss.barrier and settings.loss.penalty == "log" else None,
        texts=lambda pair: _texts(comparisons, pair, tokenizer),
        worst=settings.evaluation.worst,
    )
    # One NaN would make the reference NaN, and with it every standardized score.
    finite = scores[np.isfinite(scores)]
    return card, Reference(float(finite.mean()), float(finite.std()), len(finite))


def scored_pairs(comparisons: Comparisons, scores: np.ndarray, settings: ReportSettings) -> ScoredPairs:
    """The pairs of rows with the scores of their answers; answers of equal rank are no pair.

    scores: of all answers, float64 [N].
    """
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
        conditions=tuple(comparisons.condition(int(row)) or "" for row in rows),
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
    """Number of each row's twins, int64 [R]: rows with the same two answers in the opposite order; -1 = no twin."""
    # dtype=object: NumPy's own byte strings drop trailing zero bytes, which token ids end with.
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
    """Condition -> its replacement under the control "swapped": its twins' condition, or else the next in order."""
    names = [
        name for place, name in enumerate(comparisons.condition_names) if place in comparisons.conditions
    ]
    partners = {name: names[(place + 1) % len(names)] for place, name in enumerate(names)}
    twins = _twins(comparisons)
    conditions_of_twins: dict[int, set[str | None]] = {}
    for row in np.flatnonzero(twins >= 0).tolist():
        conditions_of_twins.setdefault(int(twins[row]), set()).add(comparisons.condition(row))
    for conditions in conditions_of_twins.values():
        pair = sorted(name for name in conditions if name is not None)
        if len(pair) == len(conditions) == 2:
            first, second = pair
            partners |= {first: second, second: first}
    return partners


def _can_apply(conditions: Conditions, control: Presentation) -> bool:
    """Whether every condition of the rows has wordings for this control; "swapped" needs two conditions."""
    names = list(conditions.partners)
    if control == "swapped":
        return len(names) > 1
    return bool(names) and (
        control == "blank" or all(conditions.wordings[name].texts(control) for name in names)
    )


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
