"""The signs of over-optimization of a run, from its records and recorded answers: finished, stopped or running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tuner.evaluation.over_optimization.drift import Answer, Drift, Record, drifts, window
from tuner.evaluation.over_optimization.scaling_law import LEAST_POINTS, Law, Point, distance, fit_law
from tuner.rollout.phrases import GrowingPhrase, growing_phrases, phrase_share
from tuner.rollout.rollout_figures import num_best
from tuner.training.run_folder import RunFolder

LEAST_ANSWERS = 40
"""Recorded answers at each end of a run from which the phrases of its best-scored tenth are compared."""


@dataclass(frozen=True)
class PhraseCourse:
    """A phrase that grows, and what the answers that hold it are worth."""

    phrase: GrowingPhrase
    """Among the answers of the last steps, against those of the first."""
    share_of_best: float
    """Share of the best-scored tenth of the last steps' answers that hold it."""
    gold_with: float | None
    """Mean gold score of the last steps' answers that hold it; None without a gold score."""
    gold_without: float | None
    """The same of those that do not hold it."""
    shares: Sequence[tuple[int, float]]
    """(step, share of its recorded answers)."""


@dataclass(frozen=True)
class OverOptimization:
    """The signs of a run."""

    name: str
    points: Sequence[Point]
    """Steps with a KL and a gold score; none without both."""
    golds_of_best: Sequence[tuple[int, float]]
    """(step, gold score of the best-scored tenth)."""
    law: Law | None
    drifts: Sequence[Drift]
    phrases: Sequence[PhraseCourse]
    missing: Sequence[str]
    """What cannot be shown of this run, and why."""
    alarm: Mapping[str, Any] | None
    """The alarm that ended the run, as results.json has it; None where none did."""


def over_optimization(run: RunFolder, round_number: int = 1) -> OverOptimization:
    """The signs of a policy run. round_number: of its round of reward model and policy, from 1."""
    return signs_of(run, run.answers, round_number)


def signs_of(run: RunFolder, answers: Mapping[int, Sequence[Answer]], round_number: int) -> OverOptimization:
    """The same of a run whose recorded answers are read already."""
    records = run.metrics
    points = _points(records, round_number)
    best = [
        (int(record["step"]), float(record["gold_top_tenth"]))
        for record in records
        if record.get("gold_top_tenth") is not None
    ]
    return OverOptimization(
        name=run.folder.name,
        points=points,
        golds_of_best=best,
        law=fit_law(points),
        drifts=drifts(records, answers),
        phrases=_phrases(records, answers),
        missing=_missing(records, points, answers),
        alarm=(run.results or {}).get("alarm"),
    )


def law_over_rounds(rounds: Sequence[OverOptimization]) -> Law | None:
    """One law over the points of all rounds, in the form of iterated RLHF (see scaling_law)."""
    return fit_law([point for signs in rounds for point in signs.points])


def results(signs: OverOptimization) -> dict[str, Any]:
    """Plain values: {"law": {"start", "alpha", "beta", "turning_point", ...}, "drifts", "phrases", "missing"}."""
    return {
        "law": None if signs.law is None else asdict(signs.law),
        "drifts": {
            drift.name: {"start": asdict(drift.start), "now": asdict(drift.now), "moved": drift.moved}
            for drift in signs.drifts
        },
        "phrases": [_phrase_results(course) for course in signs.phrases],
        "missing": list(signs.missing),
        "alarm": signs.alarm,
    }


def _phrase_results(course: PhraseCourse) -> dict[str, Any]:
    values = asdict(course)
    return {**values.pop("phrase"), **{name: value for name, value in values.items() if name != "shares"}}


def best_scored(answers: Sequence[Answer]) -> list[str]:
    """Texts of the best-scored tenth of some answers; of equal scores, earlier answers are better."""
    scores_A = np.array([np.nan if answer["score"] is None else answer["score"] for answer in answers])
    order = np.argsort(-scores_A, kind="stable")  # NaN comes last
    return [str(answers[index]["answer"]) for index in order[: num_best(len(answers))]]


def _points(records: Sequence[Record], round_number: int) -> list[Point]:
    """Of the rollouts; where no rule scores these, of the steps with a held-out gold score."""
    in_rollouts = any(record.get("gold") is not None for record in records)
    gold, score = ("gold", "score") if in_rollouts else ("eval_gold", "eval_score")
    return [
        Point(
            int(record["step"]),
            distance(record["kl_per_answer"]),
            float(record[gold]),
            float(record[score]),
            round_number,
        )
        for record in records
        if None not in (record.get("kl_per_answer"), record.get(gold), record.get(score))
    ]


def _phrases(records: Sequence[Record], answers: Mapping[int, Sequence[Answer]]) -> list[PhraseCourse]:
    ends = _ends(records, answers)
    if ends is None:
        return []
    start, now = ends
    return [_phrase_course(phrase, now, answers) for phrase in growing_phrases(_texts(now), _texts(start))]


def _phrase_course(
    phrase: GrowingPhrase, now: Sequence[Answer], answers: Mapping[int, Sequence[Answer]]
) -> PhraseCourse:
    with_it = [answer for answer in now if phrase_share(phrase.text, _texts([answer]))]
    without = [answer for answer in now if not phrase_share(phrase.text, _texts([answer]))]
    return PhraseCourse(
        phrase,
        share_of_best=phrase_share(phrase.text, best_scored(now)),
        gold_with=_gold(with_it),
        gold_without=_gold(without),
        shares=[(step, phrase_share(phrase.text, _texts(of_step))) for step, of_step in answers.items()],
    )


def _texts(answers: Sequence[Answer]) -> list[str]:
    return [str(answer["answer"]) for answer in answers]


def _gold(answers: Sequence[Answer]) -> float | None:
    golds = [answer["gold"] for answer in answers if answer.get("gold") is not None]
    return float(np.mean(golds)) if golds else None


def _ends(
    records: Sequence[Record], answers: Mapping[int, Sequence[Answer]]
) -> tuple[list[Answer], list[Answer]] | None:
    """The recorded answers of a run's first and of its last steps; None where they are too few."""
    size, steps = window(len(records)), [record["step"] for record in records]
    start, now = (
        [answer for step in part for answer in answers.get(step, ())]
        for part in (steps[:size], steps[len(steps) - size :])
    )
    return (start, now) if min(len(start), len(now)) >= LEAST_ANSWERS else None


def _missing(
    records: Sequence[Record], points: Sequence[Point], answers: Mapping[int, Sequence[Answer]]
) -> list[str]:
    sentences: list[str] = []
    if not any("kl_per_answer" in record for record in records):
        sentences.append("no step measured KL: the algorithm held no reference (kl=0)")
    elif not points:
        sentences.append("no answer has a gold score: name a rule in evaluation.rule")
    elif len(points) < LEAST_POINTS:
        sentences.append(f"{len(points)} steps have a gold score: a law is fitted from {LEAST_POINTS} on")
    if not window(len(records)):
        sentences.append(f"{len(records)} steps are too few to compare the last with the first")
    elif _ends(records, answers) is None:
        sentences.append(
            "too few answers were recorded to compare their phrases: set evaluation.recorded_answers to None"
        )
    return sentences
