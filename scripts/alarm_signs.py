"""Signs of over-optimization as numbers by step, from a run's folder, for scripts/measure_alarms.py.

A sign is a series, one number for each step, that is larger the more it speaks of over-optimization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from planted_hacks import has_hack

from tuner.evaluation.over_optimization.drift import distinct
from tuner.evaluation.over_optimization.report import best_scored
from tuner.rollout.health import Health
from tuner.rollout.phrases import favored_phrase
from tuner.rollout.rollout_figures import gold_auc
from tuner.training.run_folder import RunFolder

WARMUP = 4
"""Steps that train the critic alone: the policy is still that of SFT, which drifts are measured from."""
IN_A_ROW = 2
"""Steps in which a sign must exceed its threshold, so that chance in one step is no alarm."""
MEAN_OVER = 5
"""Steps over which scores and gold scores are averaged before they are compared."""


@dataclass(frozen=True)
class Course:
    """A run's records and answers, by step from 1."""

    name: str
    records: Sequence[Mapping[str, Any]]
    answers: Sequence[Sequence[Mapping[str, Any]]]

    @classmethod
    def of(cls, run: RunFolder) -> Course:
        answers = run.answers
        return cls(run.folder.name, run.metrics, [answers[record["step"]] for record in run.metrics])

    def figure(self, name: str) -> np.ndarray:
        return np.array([record[name] for record in self.records], dtype=float)

    def hack_shares(self, kind: str) -> list[float]:
        """Share of each step's answers that hold a hack, exactly as it was planted."""
        return [
            float(np.mean([has_hack(kind, answer["answer"]) for answer in step])) for step in self.answers
        ]


def _auc(answers: Sequence[Mapping[str, Any]]) -> float:
    """Gold scores ordered by score; 0.5, which says nothing, where all answers are right or all wrong."""
    scores, golds = (
        np.array([answer[name] for answer in answers], dtype=float) for name in ("score", "gold")
    )
    auc = gold_auc(scores, golds)
    return 0.5 if auc is None else auc


def _fall_under_a_rising_score(course: Course) -> np.ndarray:
    """How far the mean gold score is below its highest so far, where the mean score is at its highest so far."""
    window = np.ones(MEAN_OVER) / MEAN_OVER
    score, gold = (np.convolve(course.figure(name), window, "valid") for name in ("score", "gold"))
    fall = np.where(score >= np.maximum.accumulate(score), np.maximum.accumulate(gold) - gold, 0.0)
    return np.concatenate([np.zeros(MEAN_OVER - 1), fall])


def _phrase(course: Course) -> np.ndarray:
    """Share of the best-scored tenth of two steps that holds a phrase, less its share of the SFT policy's answers."""
    before = [answer["answer"] for step in course.answers[:WARMUP] for answer in step]
    series = [0.0] * WARMUP
    for index in range(WARMUP, len(course.answers)):
        best = [text for step in course.answers[index - 1 : index + 1] for text in best_scored(step)]
        phrase = favored_phrase(best, before)
        series.append(0.0 if phrase is None else phrase.share - phrase.share_elsewhere)
    return np.array(series)


def _since_warmup(values: np.ndarray) -> np.ndarray:
    return values - values[:WARMUP].mean()


SIGNS: dict[str, Callable[[Course], np.ndarray]] = {
    "gold of the best-scored tenth": lambda course: -course.figure("gold_top_tenth"),
    "AUC of gold by score": lambda course: -np.array([_auc(step) for step in course.answers]),
    "KL, nats per token": lambda course: course.figure("kl"),
    "gold falls, score rises": _fall_under_a_rising_score,
    "a phrase among the best-scored": _phrase,
    "length, from SFT": lambda course: np.abs(
        course.figure("length") / course.figure("length")[:WARMUP].mean() - 1
    ),
    "repetition, from SFT": lambda course: _since_warmup(course.figure("repetition")),
    "distinct phrases, from SFT": lambda course: (
        -_since_warmup(np.array([distinct([answer["answer"] for answer in step]) for step in course.answers]))
    ),
    "answers that end, from SFT": lambda course: -_since_warmup(course.figure("ended")),
}


def sustained(series: np.ndarray) -> np.ndarray:
    """The least of each step's value and those of the steps just before, which a threshold is compared with.

    The steps of the warm-up cannot speak.
    """
    values = np.array([series[max(0, step - IN_A_ROW + 1) : step + 1].min() for step in range(len(series))])
    values[: WARMUP + IN_A_ROW - 1] = -math.inf
    return values


def first_step(series: np.ndarray, threshold: float) -> int | None:
    """The first step, from 1, at which a sustained sign is above its threshold; None where it never is."""
    steps = np.flatnonzero(sustained(series) > threshold)
    return int(steps[0]) + 1 if len(steps) else None


def shipped_alarm(course: Course) -> int | None:
    """The step at which the alarm `exploits` of a run speaks, with its own thresholds; None where it never does."""
    health = Health()
    for record, answers in zip(course.records, course.answers, strict=True):
        best = best_scored(answers)
        others = [""] * (len(answers) - len(best))
        signs = health.judge(record, record["step"] > WARMUP, 1.0, best, others)
        if any(sign.kind == "exploits" for sign in signs):
            return int(record["step"])
    return None
