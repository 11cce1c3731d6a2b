"""Whether a trained model is one: a diverged run has no model, and ends with exit code 3."""

# torch annotates some of its functions only in part
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from tuner.errors import DivergedError


def refuse_weights(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    of_all: Callable[[list[str]], list[str]] = lambda names: names,
) -> None:
    """Raise DivergedError where a trained weight is not finite.

    of_all: joins lists of all processes, where each has parts of the weights.
    """
    broken = of_all([name for name, weight in weights.items() if not torch.isfinite(weight).all()])
    if broken:
        reason = f"{len(set(broken))} of its {len(weights)} weights are not finite, such as {broken[0]}"
        raise diverged(folder, reason)


def refuse_measures(folder: Path, results: Mapping[str, Any]) -> None:
    """Raise DivergedError where a measure after training is not finite: a number under a key `after`, at any depth."""
    for name, value in _after(results, ""):
        if not math.isfinite(value):
            raise diverged(folder, f"{name} is {value} on held-out rows")


def diverged(folder: Path, reason: str) -> DivergedError:
    """The error for a run that ended without a model."""
    return DivergedError(
        f"{folder}: this run has diverged: {reason}; no model is written, and its checkpoints are kept; train again "
        "with a lower optimizer.lr, or look at the rows, and give the run another name=..."
    )


def _after(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        name = f"{path}{key}"
        if isinstance(value, dict):
            below = cast("dict[str, Any]", value)
            yield from _after(below, f"{name}.")
        elif isinstance(value, float) and "after" in name.split("."):
            yield name, value
