"""Examples to the steps of a run: which samples, in which passes, with which totals, by step number alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.config import Source
from tuner.data.batch import Batch, gather
from tuner.data.comparisons import Comparisons
from tuner.data.examples import Examples
from tuner.data.packing import StepPlan, deal, exhausted, mixed, pack, plan_steps, shuffled


@dataclass(frozen=True)
class Contents:
    """What one rank gets of a step, and what is known of the whole step before it begins."""

    epoch: float
    """Epochs begun when the step is over."""
    batches: Sequence[Batch] = ()
    totals: Mapping[str, float] = field(default_factory=dict)
    """Name -> summed weight over all ranks."""
    tokens: int = 0
    """All tokens of the step over all ranks, learned or not."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """What else is worth logging."""


@dataclass(frozen=True)
class Stream:
    """What a run learns from, cut into steps. Its cursor is the number of the step: nothing else is stored."""

    examples: Examples | Comparisons
    """Samples, or rows of answers that are compared: what is drawn, and never split."""
    lengths: np.ndarray
    """Tokens of each sample, int64 [N]."""
    steps: Sequence[StepPlan]
    tokens_per_step: int
    tokens_per_pass: int
    exhausted: dict[int, list[str]]
    """Step (0-based) -> sources with a share whose last sample of the first epoch it draws while others go on."""

    def __len__(self) -> int:
        return len(self.steps)

    def contents(self, step: int, rank: int = 0, world: int = 1) -> Contents:
        """What one rank gets of a step."""
        passes, totals, tokens = self.passes(step), self.totals(step), self.tokens(step)
        # what a step holds beside tokens: weight learned per token, or pairs and answers
        shares = {"weight_per_token": totals["tokens"] / tokens} if "tokens" in totals else totals
        return Contents(
            epoch=self.steps[step].epoch,
            batches=[self.batch(samples) for samples in deal(passes, rank, world)],
            totals=totals,
            tokens=tokens,
            facts={**shares, "fill": tokens / self.tokens_per_step, "passes": len(passes)},
        )

    def batches(self, step: int, rank: int = 0, world: int = 1) -> Sequence[Batch]:
        """One rank's packed rows of a step; none when there are fewer passes than ranks."""
        return self.contents(step, rank, world).batches

    def origins(self, step: int) -> list[str]:
        """`file:line` of the step's rows."""
        return [self.examples.origin(index) for index in self.steps[step].samples.tolist()]

    def passes(self, step: int) -> list[list[int]]:
        """The samples of each pass of a step over all ranks, fullest pass first."""
        samples = self.steps[step].samples
        lengths = self.lengths[samples]
        groups = pack(lengths.tolist(), self.tokens_per_pass)
        groups.sort(key=lambda group: -int(lengths[group].sum()))
        return [samples[group].tolist() for group in groups]

    def batch(self, samples: Sequence[int]) -> Batch:
        """Some samples as one packed row."""
        return gather(self.examples, samples)

    def totals(self, step: int) -> dict[str, float]:
        """Summed weights of a step over all ranks, by name: of learned `tokens`, or of `pairs` and `answers`."""
        return self.examples.totals(self.steps[step].samples.tolist())

    def tokens(self, step: int) -> int:
        """All tokens of a step, learned or not."""
        return int(self.lengths[self.steps[step].samples].sum())


def make_stream(
    examples: Examples | Comparisons,
    *,
    tokens_per_step: int,
    tokens_per_pass: int,
    epochs: float,
    seed: int,
    sources: Sequence[Source] = (),
) -> Stream:
    """Plan a whole run. sources: where the samples come from; with shares, the order keeps to these."""
    lengths = examples.lengths
    shares = [source.share for source in sources if source.share is not None]
    order = mixed(lengths, examples.sources, shares, seed) if shares else shuffled(len(lengths), seed)
    steps = plan_steps(lengths, tokens_per_step, order, epochs)
    ends: dict[int, list[str]] = {}
    if len(shares) > 1:
        for source, step in exhausted(steps, examples.sources, len(shares)):
            ends.setdefault(step, []).append(sources[source].path)
    return Stream(examples, lengths, steps, tokens_per_step, tokens_per_pass, ends)
