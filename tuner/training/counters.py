"""Progress of a run, and what its validation losses decide: warnings, early stopping, the best step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tuner.config.evaluation import Validation


@dataclass
class Counters:
    """Saved with every checkpoint, so that a resumed run decides as it would have."""

    step: int = 0
    """Optimizer steps finished."""
    tokens: int = 0
    """Tokens of all steps, whether or not the loss was taken on them."""
    bad_steps: int = 0
    """Steps skipped because the loss or the gradient was not finite."""
    bad_in_a_row: int = 0
    best_loss: float = math.inf
    """Best validation loss, in nats per token that it is taken on."""
    best_score: float = -math.inf
    """Best held-out score, where the config keeps the best by one."""
    best_step: int = 0
    """Step of the best validation loss or held-out score, where the config keeps the best; else 0."""
    good_step: int = 0
    """Last saved step at which the stage saw nothing go wrong; 0: none."""
    restored_step: int = 0
    """Step that the run was rolled back to; 0: it was not."""
    evaluations_since_best: int = 0
    stopped_early: bool = False
    warned_rising: bool = False
    losses: list[float] = field(default_factory=list)
    """Training losses since the last evaluation."""
    recent: list[tuple[float, float]] = field(default_factory=list)
    """(mean training loss since the evaluation before, validation loss) at the last three evaluations."""
    state: dict[str, Any] = field(default_factory=dict)
    """What the stage carries from step to step, as JSON values."""

    @property
    def model_step(self) -> int:
        """Step whose weights are the run's model: the last, the best, or the one it was rolled back to.

        A run that was rolled back may have its best step only before that.
        """
        if self.restored_step and not 0 < self.best_step <= self.restored_step:
            return self.restored_step
        return self.best_step or self.step

    def count(self, tokens: int, is_finite: bool, loss: float | None) -> None:
        """Count a finished step.

        is_finite: whether it was not skipped. loss: its training loss; None where the stage has no `loss`.
        """
        self.step += 1
        self.tokens += tokens
        self.bad_steps += not is_finite
        self.bad_in_a_row = 0 if is_finite else self.bad_in_a_row + 1
        if is_finite and loss is not None:
            self.losses.append(loss)

    def judge(self, loss: float, limits: Validation) -> list[str]:
        """Compare a validation loss with those before; returns messages for the user."""
        messages = []
        if loss < self.best_loss:
            self.best_loss, self.evaluations_since_best = loss, 0
            self.best_step = self.step if limits.keep_best else 0
        else:
            self.evaluations_since_best += 1
        training_loss = float(np.mean(self.losses)) if self.losses else math.nan
        self.losses = []
        self.recent = [*self.recent, (training_loss, loss)][-3:]
        if is_rising(self.recent) and not self.warned_rising:
            self.warned_rising = True
            messages.append(
                "validation loss rises while training loss falls: the model begins to memorize the rows"
            )
        if limits.patience and self.evaluations_since_best >= limits.patience:
            self.stopped_early = True
            messages.append(f"no better validation loss in {limits.patience} measurements: stopping early")
        return messages

    def keep_best(self, score: float) -> None:
        """Compare a held-out score with those before: more is better."""
        if score > self.best_score:
            self.best_score, self.best_step = score, self.step


def is_rising(recent: Sequence[tuple[float, float]]) -> bool:
    """Three evaluations, (training loss, validation loss): the second rose twice while the first fell twice."""
    if len(recent) < 3:
        return False
    training, validation = np.diff(np.asarray(recent[-3:]), axis=0).T
    return bool((training < 0).all() and (validation > 0).all())
