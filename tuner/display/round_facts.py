"""What became of a run in rounds, as its page and its tables show it: plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuner.evaluation.intervals import Interval
from tuner.evaluation.over_optimization.report import OverOptimization
from tuner.evaluation.over_optimization.scaling_law import Law
from tuner.evaluation.report_card.card import Ranking


@dataclass(frozen=True)
class PatchFacts:
    """What a round's patch did to the reward model."""

    labels: int
    """Labels that were trained on."""
    original: int
    """Original rows that were trained on as well."""
    share: float
    """Of the patched weights in the model that was taken; below 1 it is an average with those before the patch."""
    costs: Sequence[str]
    """Sentences on limits that the patch exceeded; it was taken where there are none."""
    original_rows: Mapping[str, tuple[Ranking, Ranking]]
    """All original held-out rows, and those of each condition -> (before, after)."""
    patterns: Mapping[str, tuple[Ranking, Ranking]]
    """Pattern -> (before, after) on its labels that no round trains on."""


@dataclass(frozen=True)
class LabelFacts:
    """The labels of a round's pairs of answers."""

    pairs: int
    usable: int
    """Pairs that the labels decide."""
    left_out: Mapping[str, int]
    """Reason -> pairs that they do not decide."""
    report: Mapping[str, Any]
    """As `tuner.feedback.agreement.report` gives it."""


@dataclass(frozen=True)
class PatternFacts:
    """A form that a round's best-scored answers had come to carry."""

    name: str
    share_of_best: float
    """Of the best-scored answers at the round's end."""
    share_before: float
    """Of the answers at its start."""


@dataclass(frozen=True)
class RecordedAnswer:
    """An answer of a rollout."""

    round: int
    step: int
    text: str
    score: float
    """By the round's own reward model."""
    gold: float | None


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and one answer to it, or more side by side."""

    prompt: str
    condition: str | None
    origin: str
    """`file:line`."""
    answers: Sequence[RecordedAnswer]


@dataclass(frozen=True)
class AnswerChanges:
    """The answers to the same prompts at the end of a round and of the round after it."""

    rounds: tuple[int, int]
    prompts: int
    """Prompts that were answered at both ends."""
    measure: str
    """What the change is of: "gold", or "score" where the answers have no gold score."""
    risen: Sequence[AnsweredPrompt]
    fallen: Sequence[AnsweredPrompt]


@dataclass(frozen=True)
class RoundFacts:
    """A round."""

    number: int
    steps: int
    measures: Mapping[str, tuple[float | None, float | None]]
    """Figure of the held-out prompts, such as "gold" -> (before, after) the round's training."""
    courses: Mapping[str, Sequence[tuple[float, float]]]
    """Figure of the rollouts, such as "gold" -> (step, value)."""
    pattern_courses: Mapping[str, Sequence[tuple[float, float]]]
    """Pattern of any round -> (step, share of its recorded answers that carry it)."""
    kl: float | None
    """From the reference, nats per token, at the last step."""
    gold_at_end: Interval | None
    """Mean gold score of the recorded answers in the round's last part; None without a gold score."""
    shares_at_end: Mapping[str, Interval]
    """Pattern of any round -> share of these answers that carry it."""
    patterns: Sequence[PatternFacts]
    """Those looked for and seen in this round."""
    patch: PatchFacts | None
    """None where the reward model is that of the round before."""
    labels: LabelFacts | None
    """None where no pairs were labeled, as after the last round."""
    signs: OverOptimization
    best_without_gold: Sequence[AnsweredPrompt]
    """The best-scored answers of the last part whose gold score is 0."""
    worst_scored: Sequence[AnsweredPrompt]
    """The worst-scored ones."""


@dataclass(frozen=True)
class RunInRounds:
    """A run of one round or more."""

    name: str
    rounds: Sequence[RoundFacts]
    law: Law | None
    """Gold score over the distance from the reference, over the points of all rounds."""
    changes: Sequence[AnswerChanges]
    """From each round to the next."""
