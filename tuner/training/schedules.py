"""Learning rate by step number alone, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from tuner.config.training import Constant, Cosine, Linear, Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, total: int) -> float:
    """Learning rate of 0-based `step` out of `total`.

    Warm-up rises in a straight line and reaches the peak with its last step. Decay starts from the peak, and would
    reach `final` one step after the last: no step is wasted at a learning rate of zero.
    """
    warmup = warmup_steps(schedule, total)
    if step < warmup:
        return peak * (schedule.warmup_start + (1 - schedule.warmup_start) * (step + 1) / warmup)
    done = (step - warmup) / max(1, total - warmup)
    match schedule:
        case Constant():
            return peak
        case Linear(final=final):
            return peak * (final + (1 - final) * (1 - done))
        case Cosine(final=final):
            return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


def warmup_steps(schedule: Schedule, total: int) -> int:
    """Steps of warm-up, at most all but one; `schedule.warmup` is a share of all steps below 1, a number from 1 on."""
    steps = schedule.warmup * total if schedule.warmup < 1 else schedule.warmup
    return min(round(steps), max(0, total - 1))
