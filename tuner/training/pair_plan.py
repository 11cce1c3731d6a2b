"""Steps and passes of transformers' Trainer, and so of TRL's, over a number of pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuner.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PairPlan:
    """A run over a number of pairs, in a number of processes."""

    pairs: int
    pairs_per_step: int
    """Pairs of an optimizer step, over all processes."""
    pairs_per_pass: int
    """Pairs of a pass, in one process."""
    epochs: float
    max_steps: int | None = None
    processes: int = 1
    unit: str = "pairs"
    """What a row is, for messages: the config's fields are UNIT_per_step and UNIT_per_pass."""

    @property
    def passes_per_step(self) -> int:
        """Passes of each process in a step. Raises UserError when they do not fill it."""
        passes, rest = divmod(self.pairs_per_step, self.pairs_per_pass * self.processes)
        if rest:
            raise UserError(
                f"{self.unit}_per_step ({self.pairs_per_step}) is not a multiple of {self.unit}_per_pass "
                f"({self.pairs_per_pass}) times {self.processes} processes: change one of them"
            )
        return passes

    @property
    def passes_per_epoch(self) -> int:
        """Passes of each process."""
        return math.ceil(math.ceil(self.pairs / self.pairs_per_pass) / self.processes)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.passes_per_epoch / self.passes_per_step)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return min(self.planned, self.max_steps or self.planned)

    @property
    def planned(self) -> int:
        """Optimizer steps of all epochs."""
        return math.ceil(self.epochs * self.steps_per_epoch)

    @property
    def passes(self) -> int:
        """Passes of the whole run, over all processes."""
        epochs, steps = divmod(self.steps, self.steps_per_epoch)
        return (epochs * self.passes_per_epoch + steps * self.passes_per_step) * self.processes

    @property
    def seen(self) -> int:
        """Pairs of the whole run, counted each time they are seen."""
        epochs, steps = divmod(self.steps, self.steps_per_epoch)
        return epochs * self.pairs + steps * self.pairs_per_step
