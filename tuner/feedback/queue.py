"""Which pair an annotator labels next.

All orders are drawn by hashes of the seed, the annotator and the item: nothing about them has to be stored, and a
killed session goes on with the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, pstdev
from typing import NamedTuple

from tuner.errors import UserError
from tuner.feedback.agreement import decisions_by_item
from tuner.feedback.candidates import Candidate, Decision
from tuner.feedback.store import Label, LabelStore, Order, Policy, Showing

_RESERVED = 900.0
"""Seconds for which a pair that one annotator has before them counts as labelled by them."""


class _Draw(NamedTuple):
    item: str
    policy: Policy


@dataclass(frozen=True)
class Queue:
    """The pairs of a file, and the rules by which they come to annotators.

    In this order: pairs whose annotators disagree, for one who has not labeled them; pairs to repeat; and pairs in one
    order for all annotators, so that those who begin together overlap, with planted pairs anywhere among them.
    Raises UserError where an order needs scores that a row lacks.
    """

    store: LabelStore
    candidates: Mapping[str, Candidate]
    overlap: int = 1
    """Annotators for each pair. Planted pairs come to every annotator."""
    order: Order = "random"
    repeats: float = 0.1
    """Share of pairs that come to an annotator once more, unannounced."""
    repeat_after: int = 10
    """Other pairs that an annotator labels before one is repeated."""
    seed: int = 0

    def __post_init__(self) -> None:
        needed = {"random": 0, "nearest": 1, "disagreement": 2}[self.order]
        for candidate in self.candidates.values():
            if candidate.gold is None and len(candidate.scores) < needed:
                raise UserError(
                    f'{candidate.origin}: the order "{self.order}" needs "scores" of at least {needed} reward models, '
                    f"and the row has {len(candidate.scores)}; add them (a run in rounds writes those of its policy's "
                    "reward and further_rewards), or label in random order"
                )

    def next(self, annotator: str) -> Showing | None:
        """The pair that waits for the annotator's label, or a new one; None when nothing is left for them."""
        with self.store.transaction():
            showing = self.store.open_showing(annotator)
            if showing is not None and showing.item in self.candidates:
                return self.store.show_again(showing)
            draw = self._draw(annotator)
            if draw is None:
                self.store.withdraw(annotator)
                return None
            swapped = self._unit("order", annotator, draw.item, draw.policy) < 0.5
            return self.store.show(annotator, draw.item, draw.policy, swapped)

    def remaining(self, annotator: str) -> int:
        """Pairs left for the annotator if all others stopped now, without repeats."""
        labels = self._labels()
        return len(self._contested(annotator, labels)) + len(self._unlabeled(annotator, labels))

    def _draw(self, annotator: str) -> _Draw | None:
        labels = self._labels()
        if contested := self._contested(annotator, labels):
            return _Draw(contested[0], "adjudication")
        if repeatable := self._repeatable(annotator, labels):
            return _Draw(repeatable[0], "repeat")
        unlabeled = self._unlabeled(annotator, labels)
        return _Draw(unlabeled[0], self.order) if unlabeled else None

    def _labels(self) -> list[Label]:
        """The labels of people: what a program decided comes to as many of them, and contests nothing."""
        labels = self.store.labels()
        return [label for label in labels if label.item in self.candidates and not label.by_machine]

    def _contested(self, annotator: str, labels: Sequence[Label]) -> list[str]:
        """Pairs whose annotators disagree, none of them this one; planted pairs have their answer."""
        seen = {label.item for label in labels if label.annotator == annotator} | self._before_others(
            annotator
        )
        return [
            item
            for item, decisions in decisions_by_item(labels).items()
            if item not in seen and self.candidates[item].gold is None and is_contested(decisions)
        ]

    def _repeatable(self, annotator: str, labels: Sequence[Label]) -> list[str]:
        """Pairs that the annotator decided long enough ago, and that are among those to repeat."""
        own = [label for label in labels if label.annotator == annotator]
        repeated = {label.item for label in own if label.repeat}
        early = own[: -self.repeat_after] if self.repeat_after else own
        return [
            label.item
            for label in early
            if label.item not in repeated
            and label.decision is not None
            and self._unit("repeat", annotator, label.item) < self.repeats
        ]

    def _unlabeled(self, annotator: str, labels: Sequence[Label]) -> list[str]:
        """Pairs that the annotator has not labeled and that too few others have, in the queue's order."""
        own = {label.item for label in labels if label.annotator == annotator}
        others: dict[str, set[str]] = defaultdict(set)
        for label in labels:
            if label.choice != "skip":
                others[label.item].add(label.annotator)
        for showing in self.store.waiting(_RESERVED):
            others[showing.item].add(showing.annotator)
        wanted = [
            item
            for item, candidate in self.candidates.items()
            if item not in own
            and (candidate.gold is not None or len(others[item] - {annotator}) < self.overlap)
        ]
        return sorted(wanted, key=self._ranks.__getitem__)

    @cached_property
    def _ranks(self) -> dict[str, float]:
        """The place of each pair in the order, in [0, 1)."""
        ranks = {item: self._unit("random", item) for item in self.candidates}
        if self.order == "random":
            return ranks
        scored = [item for item, candidate in self.candidates.items() if candidate.gold is None]
        scored.sort(key=lambda item: (self._interest(item), ranks[item]))
        return ranks | {item: place / len(scored) for place, item in enumerate(scored)}

    def _interest(self, item: str) -> float:
        """The smaller, the earlier the pair comes."""
        differences = [first - second for first, second in self.candidates[item].scores]
        return abs(fmean(differences)) if self.order == "nearest" else -pstdev(differences)

    def _before_others(self, annotator: str) -> set[str]:
        return {showing.item for showing in self.store.waiting(_RESERVED) if showing.annotator != annotator}

    def _unit(self, *parts: str) -> float:
        """A number in [0, 1) drawn by the seed and texts."""
        return drawn_unit((self.seed, *parts))


def drawn_unit(key: object) -> float:
    """A number in [0, 1) drawn by a value: a function of its `repr` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def majority(decisions: Mapping[str, Decision]) -> Decision | None:
    """The decision of more annotators than any other; None where there is none."""
    ranked = Counter(decisions.values()).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def is_contested(decisions: Mapping[str, Decision]) -> bool:
    """Whether annotators decided, and no decision leads."""
    return bool(decisions) and majority(decisions) is None
