"""An exponential mean of a noisy series, exact from the first value on, that passes over missing ones."""

import math

HORIZON = 20
"""How many values back the mean mostly looks, by default."""


class Smoothed:
    """Mean with weights falling by 1 - 1/horizon per value, divided by their sum (Kingma & Ba, 2015, 3)."""

    def __init__(self, horizon: float = HORIZON) -> None:
        self._decay = 1 - 1 / max(horizon, 1)
        self._sum = 0.0
        self._weight = 0.0

    @property
    def value(self) -> float | None:
        """The mean so far; None before the first value."""
        return self._sum / self._weight if self._weight else None

    def add(self, value: float | None) -> float | None:
        """Take one value in, unless it is missing or not finite; the mean thereafter."""
        if value is not None and math.isfinite(value):
            self._sum = self._decay * self._sum + value
            self._weight = self._decay * self._weight + 1
        return self.value


def horizon_of(total_steps: int) -> float:
    """How many steps a run's mean loss looks back: fewer in a short run, where the loss falls fast."""
    return min(HORIZON, max(3.0, total_steps / 40))
