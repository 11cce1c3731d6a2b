"""Prompts to the steps of a run: which of them are answered, by step number alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tuner.config.data import Source
from tuner.data.packing import mixed, shuffled
from tuner.data.prompts import PromptSet
from tuner.data.stream import Contents
from tuner.errors import UserError


@dataclass(frozen=True)
class PromptStream:
    """Which prompts each step answers: the orders of all epochs, one behind the other, cut into steps of equal size.

    Its cursor is the number of the step: nothing else is stored, and a step is drawn when it is asked for.
    """

    prompts: PromptSet
    drawn: int
    """Prompts of the whole run, in steps or left over: `epochs` times their number."""
    prompts_per_step: int
    order: Callable[[int], np.ndarray]
    """The prompts of an epoch (0-based), shuffled: int64 [N]."""
    exhausted: dict[int, list[str]] = field(default_factory=dict)
    """Step (0-based) -> sources with a share whose last prompt of the first epoch it draws while others go on."""

    def __len__(self) -> int:
        """Whole steps; one that is not whole in a run that would have none."""
        return max(1, self.drawn // self.prompts_per_step)

    def step(self, index: int) -> np.ndarray:
        """int64 [prompts_per_step]: the prompts of a step in their places; one may occur twice over an epoch's end."""
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of {len(self)}")
        count, (begin, end) = len(self.prompts), self.bounds(index)
        first, last = begin // count, (end - 1) // count
        orders = np.concatenate([self.order(epoch) for epoch in range(first, last + 1)])
        return orders[begin - first * count : end - first * count].astype(np.int64)

    def epoch(self, index: int) -> float:
        """Epochs begun when a step is over: 1.5 is half-way through the second."""
        return self.bounds(index)[1] / len(self.prompts)

    def bounds(self, index: int) -> tuple[int, int]:
        """Where a step begins and ends among the prompts of the whole run."""
        begin = index * self.prompts_per_step
        return begin, min(begin + self.prompts_per_step, self.drawn)

    def contents(self, step: int, rank: int = 0, world: int = 1) -> Contents:
        """What is known of a step before its prompts are answered."""
        return Contents(epoch=self.epoch(step))

    def origins(self, step: int) -> list[str]:
        """`file:line` of a step's prompts."""
        return [self.prompts.origin(index) for index in self.step(step).tolist()]


def plan_prompts(
    prompts: PromptSet,
    *,
    prompts_per_step: int,
    epochs: float,
    seed: int,
    sources: Sequence[Source] = (),
) -> PromptStream:
    """Plan a whole run. sources: where the prompts come from; with shares of prompts, the order keeps to these.

    Raises UserError when no prompt is drawn at all.
    """
    count = len(prompts)
    drawn = int(epochs) * count + round((epochs - int(epochs)) * count)
    if not drawn:
        raise UserError(
            f"prompts: {epochs:g} epochs of {count:,} prompts are none to answer; give more of either"
        )
    shares = [source.share for source in sources if source.share is not None]
    alike = np.ones(count, dtype=np.int64)  # a share is one of prompts, however long they are
    order = mixed(alike, prompts.sources, shares, seed) if shares else shuffled(count, seed)
    stream = PromptStream(prompts, drawn, prompts_per_step, order)
    ends: dict[int, list[str]] = {}
    for step, source in _exhausted(stream) if len(shares) > 1 else ():
        ends.setdefault(step, []).append(sources[source].path)
    return replace(stream, exhausted=ends)


def _exhausted(stream: PromptStream) -> list[tuple[int, int]]:
    """(step, source) that draws its last prompt of the first epoch, for sources that end before the others."""
    drawn = stream.prompts.sources[stream.order(0)]
    ends = {source: int(np.flatnonzero(drawn == source)[-1]) for source in np.unique(drawn).tolist()}
    steps = {source: end // stream.prompts_per_step for source, end in ends.items()}
    last, end_of_run = max(steps.values()), stream.bounds(len(stream) - 1)[1]
    early = [source for source, step in steps.items() if step < last and ends[source] < end_of_run]
    return [(steps[source], source) for source in early]
