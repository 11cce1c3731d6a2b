"""The nouns of the script: a case, what it measures, the bounds on it, and the place it runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch


@dataclass(frozen=True)
class Bound:
    """A target: what a value must not exceed, or must reach."""

    kind: Literal["at most", "at least"]
    value: float

    def holds(self, value: float) -> bool:
        """Whether a value is within it; NaN never is."""
        return value <= self.value if self.kind == "at most" else value >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.kind == 'at most' else '≥'} {self.value:g}"


def at_most(value: float) -> Bound:
    return Bound("at most", value)


def at_least(value: float) -> Bound:
    return Bound("at least", value)


@dataclass(frozen=True)
class Measurement:
    """One value that a case has measured."""

    name: str
    """Of the value within its case, such as "peak"."""
    value: float
    unit: str
    predicted: float | None = None
    """Of memory: what `tuner check --memory` predicts, in the same unit."""
    setting: str = ""
    """What of several settings it was measured in, in words."""


class NotHereError(Exception):
    """Something that a case needs is not on this machine: what, in a few words, such as "trl is not installed"."""


@dataclass(frozen=True)
class Place:
    """Where a case runs, and what is there for it."""

    device: torch.device
    is_dry: bool
    """Whether the small stand-in of the case is to run, on any device: a test of the script, not a measurement."""
    models: Path
    """Folder of random models, which cases share."""
    work: Path
    """An empty folder of the case's own."""
    earlier: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Case and name of a value -> the value, of what this call of the script has measured so far."""

    def size(self, real: int, small: int) -> int:
        """A size as it is measured, or as it is in the dry run."""
        return small if self.is_dry else real

    def synchronize(self) -> None:
        """Wait until the device has done the work that was queued for it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Case:
    """Something to be measured on a card, in a process of its own."""

    name: str
    """KIND.WHAT, such as "memory.nf4_7b_2k"."""
    what: str
    """What is measured, as a sentence without a full stop."""
    measure: Callable[[Place], Iterator[Measurement]]
    """Measures it; values count as soon as they are yielded. Raises NotHereError where something is missing."""
    seconds: int
    """Estimated time on one H100 or H200, without making the random models."""
    bounds: Mapping[str, Bound] = field(default_factory=dict)
    """Name of a measured value -> its target."""
    shapes: tuple[str, ...] = ()
    """Names of the random models it reads (`shapes.py`)."""
    needs: tuple[str, ...] = ()
    """Modules without which it cannot run, as they are imported."""
    first: tuple[str, ...] = ()
    """Modules that are imported before all others, which they change; the case is then an interpreter of its own."""
    beside: tuple[str, ...] = ()
    """Cases whose values of the same call it reads: they run before it, even where they have been measured."""
