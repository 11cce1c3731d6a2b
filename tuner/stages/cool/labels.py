"""The labels of all rounds: one set, which grows, and which every patch takes as it is by then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuner.feedback.preferences import preference_rows
from tuner.feedback.queue import drawn_unit
from tuner.stages.cool.rounds import RoundPlace

SLOW = "policies"
"""Pattern of the pairs that were chosen for no pattern."""


@dataclass(frozen=True)
class LabeledPairs:
    """The labels of some rounds, as rows of preferences."""

    rows: Sequence[dict[str, Any]]
    """Each with the `round` and the `pattern` of its pair."""
    left_out: int
    """Pairs without a usable label: undecided, contested, tied, or not labeled yet."""

    def split(self, held_out: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(rows to train on, rows that measure). All pairs of a prompt fall on the same side, in every round."""
        train: list[dict[str, Any]] = []
        test: list[dict[str, Any]] = []
        for row in self.rows:
            (test if drawn_unit(row["prompt"]) < held_out else train).append(row)
        return train, test


def labels_before(place: RoundPlace, rounds: Sequence[RoundPlace]) -> LabeledPairs:
    """The labels of all rounds before one, as they are now: those that came late as well."""
    rows: list[dict[str, Any]] = []
    left_out = 0
    for earlier in rounds[: place.number - 1]:
        if not earlier.labels.is_file():
            continue
        candidates, labels = earlier.label_files.read()
        preferences, reasons = preference_rows(labels, candidates)
        left_out += reasons.total() - reasons["planted"]
        rows += [
            {**row, "round": earlier.number, "pattern": candidates[row["id"]].row.get("pattern", SLOW)}
            for row in preferences
        ]
    return LabeledPairs(rows, left_out)
