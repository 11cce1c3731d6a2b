"""Labelers: programs that label candidates as people do, in the same store, and what still waits for people."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tuner.config.feedback_config import Judge, People, RuleFeedback
from tuner.feedback.agreement import decisions_by_item
from tuner.feedback.candidates import Candidate, Decision
from tuner.feedback.queue import is_contested
from tuner.feedback.store import LabelStore

Advance = Callable[[int], None]
"""Called with the number of pairs that were labeled since its last call. An exception that it raises ends the labeling;
what is stored stays."""


def no_advance(count: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Labeling:
    """What is to be said of a labeler's work. Counts are of all candidates, whenever they were labeled."""

    annotator: str
    figures: Mapping[str, int | float | None] = field(default_factory=dict[str, "int | float | None"])
    """Name -> number, for results.json."""
    sentences: tuple[str, ...] = ()
    """For people, each beginning with the annotator's name."""


class Labeler(Protocol):
    """A program that labels candidates."""

    @property
    def annotator(self) -> str:
        """The name under which its labels are stored."""
        ...

    def label(
        self, candidates: Mapping[str, Candidate], store: LabelStore, advance: Advance = no_advance
    ) -> Labeling:
        """Store a label of each candidate that has none of this labeler, each at once.

        Killed at any point and called again, it repeats nothing. Raises UserError where it cannot go on.
        """
        ...


def labeler_of(config: Judge | RuleFeedback) -> Labeler:
    """The labeler of a config. Raises UserError where its rule cannot be loaded or its API key is not set."""
    if isinstance(config, Judge):
        # imported here: a rule needs no HTTP
        from tuner.feedback.judge import JudgeLabeler

        return JudgeLabeler(config)
    from tuner.feedback.rule_labeler import RuleLabeler

    return RuleLabeler(config)


def unlabeled(candidates: Mapping[str, Candidate], store: LabelStore, annotator: str) -> list[Candidate]:
    """The candidates without a label of this annotator, in order."""
    labeled = {label.item for label in store.labels() if label.annotator == annotator}
    return [candidate for item, candidate in candidates.items() if item not in labeled]


def decision_counts(
    candidates: Mapping[str, Candidate], store: LabelStore, annotator: str
) -> Counter[Decision | None]:
    """How often an annotator decided what of these candidates; None: labels that decide nothing."""
    return Counter(
        label.decision
        for label in store.labels()
        if label.annotator == annotator and label.item in candidates
    )


# people


@dataclass(frozen=True)
class WaitingPairs:
    """What people have still to do."""

    pairs: int
    """Pairs that fewer people than wanted have labeled or skipped; planted pairs do not count."""
    labels: int
    """Labels that those pairs lack."""
    contested: int
    """Pairs that enough people labeled, and on which they disagree; nobody waits for them."""

    def sentences(self, target: str) -> tuple[str, ...]:
        """What is to be said of them. target: the argument of `tuner label`: a run, a round of it, or a file."""
        sentences: list[str] = []
        if self.pairs:
            sentences.append(
                f"{self.pairs:,} pairs wait for {self.labels:,} labels by people: run `tuner label {target}` (each "
                "person with their own --name), then this command again"
            )
        if self.contested:
            sentences.append(
                f"{self.contested:,} pairs are contested and left out: `tuner label {target}` shows them first to "
                "whoever has not labeled them"
            )
        return tuple(sentences)


def waiting_for_people(
    people: People, candidates: Mapping[str, Candidate], store: LabelStore
) -> WaitingPairs:
    """The pairs that wait for people. Who skips a pair has seen it: it would otherwise wait for ever."""
    by_people = [label for label in store.labels() if not label.by_machine and not label.repeat]
    seen: dict[str, set[str]] = defaultdict(set)
    for label in by_people:
        seen[label.item].add(label.annotator)
    decisions = decisions_by_item(by_people)
    items = [item for item, candidate in candidates.items() if candidate.gold is None]
    lacking = [people.overlap - len(seen[item]) for item in items]
    return WaitingPairs(
        pairs=sum(count > 0 for count in lacking),
        labels=sum(count for count in lacking if count > 0),
        contested=sum(
            count <= 0 and is_contested(decisions.get(item, {}))
            for item, count in zip(items, lacking, strict=True)
        ),
    )
