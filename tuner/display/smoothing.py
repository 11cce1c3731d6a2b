"""The running mean of a noisy series."""

import math

HORIZON = 20
"""Default number of values that dominate the mean."""


class RunningMean:
    """Mean with weights falling by 1 - 1/horizon per value, divided by their sum (Kingma & Ba, 2015, section 3).

    The division makes it unbiased from the first value on; missing values are skipped.
    """

    def __init__(self, horizon: float = HORIZON) -> None:
        self._decay = 1 - 1 / max(horizon, 1)
        self._sum = 0.0
        self._weight = 0.0

    @property
    def value(self) -> float | None:
        """The mean so far; None before the first value."""
        return self._sum / self._weight if self._weight else None

    def add(self, value: float | None) -> float | None:
        """Take in one value, unless it is missing or not finite; returns the mean thereafter."""
        if value is not None and math.isfinite(value):
            self._sum = self._decay * self._sum + value
            self._weight = self._decay * self._weight + 1
        return self.value


def horizon_of(total_steps: int) -> float:
    """Horizon of a run's means, in steps: shorter in a short run, where values change fast."""
    return min(HORIZON, max(3.0, total_steps / 40))
