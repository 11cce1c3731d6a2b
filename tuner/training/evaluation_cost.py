"""What evaluations cost: said where they take more than a tenth of a run."""

from __future__ import annotations

LARGE_SHARE = 0.1
"""Share of a run's time from which on evaluations are worth a sentence ..."""
SECONDS_AT_LEAST = 10.0
"""... but none that take less than this together."""


class EvaluationCost:
    """The time that evaluations during training take."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._is_known = False

    def add(self, seconds: float, run_seconds: float) -> list[str]:
        """Count an evaluation, in a run that began so long ago; returns a sentence once, where they cost much."""
        self._seconds += seconds
        share = self._seconds / max(run_seconds, self._seconds)
        if self._is_known or share <= LARGE_SHARE or self._seconds < SECONDS_AT_LEAST:
            return []
        self._is_known = True
        return [
            f"evaluations have taken {share:.0%} of the time so far ({self._seconds:.0f} of {run_seconds:.0f} s); "
            "a larger evaluation.every or a smaller evaluation.rows makes them cheaper"
        ]
