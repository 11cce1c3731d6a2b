"""What has changed in a policy's answers since its first steps: lengths, repetition, refusals, ends, correlations.

A step's figure is one number, so that a mean over steps has an interval whatever the figure is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuner.evaluation.intervals import Interval
from tuner.evaluation.over_optimization.scaling_law import t_quantile
from tuner.rollout.phrases import words_of

LEAST_STEPS = 4
"""Steps at the start, and at the end, whose means are compared; a tenth of a longer run."""
MOVED_DEVIATIONS = 4.0
"""A figure has moved where its two means differ by so many standard errors."""
ROUNDING = 1e-12
"""Differences below this are rounding."""
DISTINCT_WORDS = 2
"""Length in words of the phrases of which distinct ones are counted."""

REFUSAL = re.compile(
    r"\b(?:I|we)(?:'m| am| are|'re)? (?:cannot|can't|can not|won't|will not|do not know|don't know|have no answer"
    r"|unable|not able|sorry)|\bas an? (?:AI|language model)|unknown to me|无法|不能(?:回答|提供|帮)|抱歉|对不起",
    re.IGNORECASE,
)
"""What an answer that refuses says, in English or Chinese."""

FIGURES = {
    "score": "score",
    "gold": "gold score",
    "length": "tokens per answer",
    "ended": "answers that ended",
    "repetition": "repeated 4-token phrases",
    "entropy": "entropy, nats per token",
    "score_length_rank_correlation": "rank correlation of score and length",
}
"""Name in a step's record -> what is shown."""

Record = Mapping[str, Any]
Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Drift:
    """A figure at the start of a run and at its end, with 95% intervals over steps."""

    name: str
    """In a step's record; those of recorded answers are `distinct` and `refusals`."""
    title: str
    start: Interval
    now: Interval
    deviations: float
    """The change in standard errors of the difference of the means; infinite where the means alone differ."""

    @property
    def moved(self) -> bool:
        return abs(self.deviations) >= MOVED_DEVIATIONS


def window(num_steps: int) -> int:
    """Number of steps at each end that are compared; 0 where the run is too short to have both."""
    steps = max(LEAST_STEPS, num_steps // 10)
    return steps if num_steps >= 2 * steps else 0


def drifts(records: Sequence[Record], answers: Mapping[int, Sequence[Answer]]) -> list[Drift]:
    """Every figure that all the steps at both ends have. answers: step -> its recorded answers."""
    size = window(len(records))
    if not size:
        return []
    names = {name: _from_record(name) for name in _names(records)}
    if answers:
        names |= {"distinct": _of_answers(answers, distinct), "refusals": _of_answers(answers, refusals)}
    shown: list[Drift] = []
    for name, figure in names.items():
        start, now = ([figure(record) for record in part] for part in (records[:size], records[-size:]))
        if None not in start and None not in now:
            shown.append(_drift(name, np.array(start, dtype=float), np.array(now, dtype=float)))
    return shown


def distinct(texts: Sequence[str]) -> float:
    """Distinct two-word phrases of the texts over all of them (distinct-2, Li et al., arXiv 1510.03055); 1 of none."""
    phrases = [
        tuple(words[start : start + DISTINCT_WORDS])
        for words in map(words_of, texts)
        for start in range(len(words) - DISTINCT_WORDS + 1)
    ]
    return len(set(phrases)) / len(phrases) if phrases else 1.0


def refusals(texts: Sequence[str]) -> float:
    """Share of the texts that refuse to answer, or say that they do not know."""
    return sum(REFUSAL.search(text) is not None for text in texts) / len(texts)


def _names(records: Sequence[Record]) -> list[str]:
    """FIGURES, and those by condition where there are several."""
    conditions = [name for name in records[-1] if name.startswith("score_length_rank_correlation/")]
    return [*FIGURES, *(conditions if len(conditions) > 1 else [])]


def _from_record(name: str) -> Callable[[Record], float | None]:
    return lambda record: record.get(name)


def _of_answers(
    answers: Mapping[int, Sequence[Answer]], figure: Callable[[Sequence[str]], float]
) -> Callable[[Record], float | None]:
    def of_step(record: Record) -> float | None:
        texts = [str(answer["answer"]) for answer in answers.get(record["step"], ())]
        return figure(texts) if texts else None

    return of_step


def _drift(name: str, start_S: np.ndarray, now_S: np.ndarray) -> Drift:
    error = math.sqrt((start_S.var(ddof=1) + now_S.var(ddof=1)) / len(start_S))
    change = float(now_S.mean() - start_S.mean())
    if error > ROUNDING:
        deviations = change / error
    else:
        deviations = math.copysign(math.inf, change) if abs(change) > ROUNDING else 0.0
    return Drift(name, _title(name), _mean(start_S), _mean(now_S), deviations)


def _title(name: str) -> str:
    further = {"distinct": "distinct 2-word phrases", "refusals": "answers that refuse"}
    base, _, condition = name.partition("/")
    title = (FIGURES | further)[base]
    return f"{title}, {condition}" if condition else title


def _mean(values_S: np.ndarray) -> Interval:
    """Mean over steps with its t interval."""
    mean = float(values_S.mean())
    half = t_quantile(len(values_S) - 1) * float(values_S.std(ddof=1)) / math.sqrt(len(values_S))
    return Interval(mean, mean - half, mean + half)
