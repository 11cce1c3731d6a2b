"""How transformers' Trainer, and so TRL's, goes through a number of pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuner.config import DPO
from tuner.errors import UserError


@dataclass(frozen=True)
class PairPlan:
    """The steps of a run over so many pairs, in so many processes."""

    config: DPO
    pairs: int
    processes: int = 1

    @property
    def passes_per_step(self) -> int:
        """Passes of each process in a step. Raises UserError when they do not fill it."""
        config = self.config
        passes, rest = divmod(config.pairs_per_step, config.pairs_per_pass * self.processes)
        if rest:
            raise UserError(
                f"pairs_per_step ({config.pairs_per_step}) is not a multiple of pairs_per_pass "
                f"({config.pairs_per_pass}) times {self.processes} processes: change one of them"
            )
        return passes

    @property
    def passes_per_epoch(self) -> int:
        """Passes of each process."""
        return math.ceil(math.ceil(self.pairs / self.config.pairs_per_pass) / self.processes)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.passes_per_epoch / self.passes_per_step)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        steps = math.ceil(self.config.epochs * self.steps_per_epoch)
        return min(steps, self.config.max_steps or steps)

    @property
    def passes(self) -> int:
        """Passes of the whole run, over all processes."""
        epochs, steps = divmod(self.steps, self.steps_per_epoch)
        own = epochs * self.passes_per_epoch + steps * self.passes_per_step
        return own * self.processes

    @property
    def seen(self) -> int:
        """Pairs of the whole run."""
        epochs, steps = divmod(self.steps, self.steps_per_epoch)
        return epochs * self.pairs + steps * self.config.pairs_per_step
