"""From labels to the rows of preferences that a reward model is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.feedback.agreement import decisions_by_item
from tuner.feedback.candidates import Candidate
from tuner.feedback.queue import majority
from tuner.feedback.store import Label


def preference_rows(
    labels: Sequence[Label], candidates: Mapping[str, Candidate]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows, in the order of the candidates, and how many candidates gave none, by the reason.

    A pair is decided by the majority of the people who decided it, or of the programs where no person did. Its weight
    is the share of them that decided so, times the row's own.
    """
    by_machines, by_people = (
        decisions_by_item([label for label in labels if label.by_machine == by_machine])
        for by_machine in (True, False)
    )
    decisions = by_machines | by_people
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for item, candidate in candidates.items():
        votes = decisions.get(item, {})
        winner = majority(votes)
        if candidate.gold is not None:
            left_out["planted"] += 1
        elif not votes:
            left_out["without a decision"] += 1
        elif winner is None:
            left_out["contested"] += 1
        elif winner == "tie":
            left_out["ties"] += 1
        elif not candidate.answers[chosen := ("first", "second").index(winner)].strip():
            left_out["with an empty better answer"] += 1  # which no reward model may learn to prefer
        else:
            share = sum(vote == winner for vote in votes.values()) / len(votes)
            rows.append(candidate.preference(chosen, share))
    return rows, left_out
