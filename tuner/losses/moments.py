"""Mean and variance of numbers that are never all in one place: of all ranks in a step, and of all steps of a run.

Two classes, for neither representation serves both: plain sums are what an all-reduce adds, but lose all digits of a
small variance far from zero over a long run; running moments keep them, but merging is not addition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

EPSILON = 1e-8
"""Added to a standard deviation before dividing by it."""


@dataclass(frozen=True)
class MomentSums:
    """Count and power sums in fp64: added field by field over ranks, they are those of all ranks' numbers."""

    count: float
    total: float
    """Sum of the numbers."""
    squares: float
    """Sum of their squares."""

    @classmethod
    def of(cls, values_N: torch.Tensor) -> MomentSums:
        """Of a tensor; waits for the device once."""
        values_N = values_N.detach().double()
        total, squares = torch.stack([values_N.sum(), values_N.square().sum()]).tolist()
        return cls(count=float(len(values_N)), total=total, squares=squares)

    def __add__(self, other: MomentSums) -> MomentSums:
        return MomentSums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """0 of no numbers."""
        return self.total / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """Of the population; 0 of no numbers, and of numbers that fp32 could not tell apart."""
        if not self.count:
            return 0.0
        mean_square = self.squares / self.count
        variance = mean_square - self.mean**2
        return variance if not variance <= 1e-14 * mean_square else 0.0  # "not <=": a NaN stays NaN

    @property
    def std(self) -> float:
        """Standard deviation of the population."""
        return math.sqrt(self.variance)


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and summed squared deviation from the mean, in fp64 (Chan, Golub & LeVeque, 1983).

    Checkpoints hold it as its three fields.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of (x − mean)²."""

    def merged(self, values: np.ndarray) -> RunningMoments:
        """The moments of the numbers so far and of `values`, float64 [N], together."""
        if not len(values):
            return self
        mean = float(values.mean())
        squares, count = float(((values - mean) ** 2).sum()), self.count + len(values)
        difference = mean - self.mean
        return RunningMoments(
            count,
            self.mean + difference * len(values) / count,
            self.squares + squares + difference**2 * self.count * len(values) / count,
        )

    @property
    def std(self) -> float:
        """Standard deviation of the population; 0 of no numbers."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def standardized(self, values: np.ndarray) -> np.ndarray:
        """(x − mean) / (standard deviation + 1e-8), float64 [N]."""
        return (values - self.mean) / (self.std + EPSILON)
