"""The prompts of each step of a run, as a function of the step's number alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tuner.config.data import Source
from tuner.data.packing import ALONE, Share, mixed, shuffled
from tuner.data.prompts import PromptSet
from tuner.data.stream import Contents
from tuner.errors import UserError


@dataclass(frozen=True)
class PromptStream:
    """The prompts of all epochs in shuffled order, cut into steps of equal size.

    Its cursor is the step's number: nothing else is stored in checkpoints, and a step's prompts are drawn on demand.
    """

    prompts: PromptSet
    drawn: int
    """Prompts of the whole run, `epochs` times their number; those after the last whole step are not used."""
    prompts_per_step: int
    order: Callable[[int], np.ndarray]
    """Order of the prompts in an epoch (0-based): int64 [N]."""
    exhausted: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    """Step (0-based) -> sources with a share that it exhausts in the first epoch while others go on."""
    answers_per_prompt: int = 1
    max_new_tokens: int = 0
    """Tokens of an answer, at most."""

    def __len__(self) -> int:
        """Number of whole steps; 1 for a run shorter than a step, whose only step is not whole."""
        return max(1, self.drawn // self.prompts_per_step)

    def step(self, index: int) -> np.ndarray:
        """int64 [prompts_per_step]: indices of a step's prompts; one may occur twice where an epoch ends in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of {len(self)}")
        count, (begin, end) = len(self.prompts), self.bounds(index)
        first, last = begin // count, (end - 1) // count
        orders = np.concatenate([self.order(epoch) for epoch in range(first, last + 1)])
        return orders[begin - first * count : end - first * count].astype(np.int64)

    def epoch(self, index: int) -> float:
        """Epochs completed after a step, with the fraction of the current one: 1.5 is half-way through the second."""
        return self.bounds(index)[1] / len(self.prompts)

    def bounds(self, index: int) -> tuple[int, int]:
        """(first prompt, one past the last) of a step, counted over the whole run."""
        begin = index * self.prompts_per_step
        return begin, min(begin + self.prompts_per_step, self.drawn)

    def contents(self, step: int, share: Share = ALONE) -> Contents:
        """The epoch of a step; its batches and totals are only known after the rollout."""
        return Contents(epoch=self.epoch(step))

    def tokens_until(self, step: int) -> int:
        """Tokens of the first so many steps, where all prompts have the mean length and all answers the maximum."""
        answers = self.bounds(step - 1)[1] * self.answers_per_prompt
        return round(answers * (float(self.prompts.lengths.mean()) + self.max_new_tokens))

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
    answers_per_prompt: int = 1,
    max_new_tokens: int = 0,
) -> PromptStream:
    """Plan a whole run. sources: of the prompts; where they have shares, the order keeps to them.

    max_new_tokens: of an answer.

    Raises UserError when the run would have no prompt at all.
    """
    count = len(prompts)
    drawn = int(epochs) * count + round((epochs - int(epochs)) * count)
    if not drawn:
        raise UserError(
            f"prompts: {epochs:g} epochs of {count:,} prompts are none to answer; give more of either"
        )
    shares = [source.share for source in sources if source.share is not None]
    ones = np.ones(count, dtype=np.int64)  # shares are of prompts, whatever their lengths
    order = mixed(ones, prompts.sources, shares, seed) if shares else shuffled(count, seed)
    stream = PromptStream(
        prompts,
        drawn,
        prompts_per_step,
        order,
        answers_per_prompt=answers_per_prompt,
        max_new_tokens=max_new_tokens,
    )
    ends: dict[int, list[str]] = {}
    for step, source in _exhausted(stream) if len(shares) > 1 else ():
        ends.setdefault(step, []).append(sources[source].path)
    return replace(stream, exhausted=ends)


def _exhausted(stream: PromptStream) -> list[tuple[int, int]]:
    """(step that draws its last prompt of the first epoch, source) of every source that ends before another."""
    sources = stream.prompts.sources[stream.order(0)]
    ends = {source: int(np.flatnonzero(sources == source)[-1]) for source in np.unique(sources).tolist()}
    steps = {source: end // stream.prompts_per_step for source, end in ends.items()}
    last, end_of_run = max(steps.values()), stream.bounds(len(stream) - 1)[1]
    early = [source for source, step in steps.items() if step < last and ends[source] < end_of_run]
    return [(steps[source], source) for source in early]
