"""Original preferences that contradict the labels: those that prefer a pattern which the labels reject.

A hack comes from the original preferences, where better answers happen to carry it. Beside a hundred labels, hundreds
of such rows teach it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tuner.config import Source
from tuner.data.conversation import Preference
from tuner.data.preference_rows import preference_reader
from tuner.data.sources import Row
from tuner.errors import UserError
from tuner.stages.cool.labels import SLOW
from tuner.stages.cool.patterns import carries

REJECTED_SHARE, REJECTED_LABELS = 0.8, 5
"""Labels reject a pattern where at least the second number of them are of pairs of which one answer alone carries it,
and at least the first share of these prefer the other answer."""


def rejected_patterns(labels: Sequence[dict[str, Any]]) -> list[str]:
    """The patterns of labeled pairs that the labels, rows of preferences, reject."""
    preferences = [preference_reader(None).read(row, "a label") for row in labels]
    rejected: list[str] = []
    for pattern in sorted({row["pattern"] for row in labels} - {SLOW}):
        signs = Counter(_sign(pattern, preference) for preference in preferences)
        decided = signs[1] + signs[-1]
        if decided >= REJECTED_LABELS and signs[-1] >= REJECTED_SHARE * decided:
            rejected.append(pattern)
    return rejected


class Contradictions:
    """Finds and counts the original rows that prefer a rejected pattern."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = patterns
        self.counts: Counter[str] = Counter()
        """Pattern -> rows that were left out for it."""

    def agrees(self, source: Source) -> Callable[[Row], bool]:
        """Whether a row of the source may be drawn. One that cannot be read alone may: training tells what it is."""
        reader = preference_reader(source.shape if isinstance(source.shape, str) else None)

        def agrees(row: Row) -> bool:
            if not self._patterns:
                return True
            try:
                preference: Preference = reader.read(row.values, row.origin)
            except UserError:
                return True
            preferred = [pattern for pattern in self._patterns if _sign(pattern, preference) > 0]
            self.counts.update(preferred)
            return not preferred

        return agrees


def _sign(pattern: str, preference: Preference) -> int:
    """1 where the best answer alone carries a pattern, -1 where the worst alone does, else 0."""
    best, worst = (carries(pattern, preference.answers[place][-1].content) for place in (0, -1))
    return int(best) - int(worst)
