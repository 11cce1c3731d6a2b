"""What this process holds of the trained weights: each whole, or its rows of one that several processes hold together.

Optimizer, clipping and checkpoints work on these parts, which are plain tensors in any layout of the processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch


class Rows(NamedTuple):
    """Some rows of a weight: `first` to before `end`."""

    first: int
    end: int


@dataclass(frozen=True)
class Part:
    """This process's part of a trained weight."""

    weight: torch.nn.Parameter
    """The weight, as the model has it: a DTensor where it is in shards."""
    own: torch.nn.Parameter
    """The part, in the weight's memory; of a weight held whole, the weight itself."""
    rows: Rows | None
    """Which rows of the weight it is; None: all of it."""

    @classmethod
    def of(cls, weight: torch.nn.Parameter) -> Self:
        """This process's part of a weight of a model that is laid out over the processes."""
        sharded: Any = weight
        if not hasattr(sharded, "to_local"):
            return cls(weight, weight, None)
        own = torch.nn.Parameter(sharded.detach().to_local())
        # FSDP's cut along the first dimension: equal parts, the last ones shorter or empty
        height = -(-len(weight) // sharded.device_mesh.size())
        first = min(sharded.device_mesh.get_local_rank() * height, len(weight))
        return cls(weight, own, Rows(first, first + len(own)))

    def take_gradient(self) -> None:
        """Let the part have the weight's gradient."""
        if self.rows is not None:
            gradient: Any = self.weight.grad
            # of an empty part none: bitsandbytes cannot step it
            self.own.grad = None if gradient is None or not self.own.numel() else gradient.to_local()

    def clear_gradient(self) -> None:
        # None and not zeros: a set that has no gradients in an update is then left alone by the optimizer,
        # which at zeros would still move it by momentum and weight decay
        self.weight.grad = self.own.grad = None


def parts_of(weights: Mapping[str, torch.nn.Parameter]) -> dict[str, Part]:
    """This process's parts of some trained weights, by name."""
    return {name: Part.of(weight) for name, weight in weights.items()}
