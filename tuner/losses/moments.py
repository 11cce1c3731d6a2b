"""Mean and variance of numbers that are never all in memory: over the ranks of a step, and the steps of a run.

Two classes, since neither representation serves both: an all-reduce can add plain sums, but over a long run they lose
all digits of a variance that is small against the mean; running moments keep those, but merging is not addition.
"""

# torch annotates some of its functions only in part
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
from collections.abc import Mapping
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
        """Sums of a tensor's numbers; waits for the device once."""
        values_N = values_N.detach().double()
        sums: list[float] = torch.stack([values_N.sum(), values_N.square().sum()]).tolist()
        return cls(float(len(values_N)), *sums)

    def __add__(self, other: MomentSums) -> MomentSums:
        return MomentSums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """0 where there are no numbers."""
        return self.total / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """Of the population; 0 where there are no numbers, or where fp32 could not tell them apart."""
        if not self.count:
            return 0.0
        mean_square = self.squares / self.count
        variance = mean_square - self.mean**2
        return variance if not variance <= 1e-14 * mean_square else 0.0  # not ">": a NaN must stay NaN

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

    @classmethod
    def from_dict(cls, fields: Mapping[str, float]) -> RunningMoments:
        """From its fields, as a checkpoint has them; of no numbers where there are none."""
        return cls(int(fields.get("count", 0)), fields.get("mean", 0.0), fields.get("squares", 0.0))

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
        """Standard deviation of the population; 0 where there are no numbers."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def standardized(self, values: np.ndarray) -> np.ndarray:
        """(x − mean) / (standard deviation + 1e-8), float64 [N]."""
        return (values - self.mean) / (self.std + EPSILON)
