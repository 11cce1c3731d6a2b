"""The samples, passes and totals of each step of a run, as a function of the step's number alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.config import ShortRows, Source
from tuner.data.batch import Batch, gather
from tuner.data.comparisons import Comparisons
from tuner.data.examples import Examples
from tuner.data.packing import ALONE, Share, StepPlan, exhausted, mixed, pack, plan_steps, shuffled, strata


@dataclass(frozen=True)
class Contents:
    """One rank's batches of a step, and the totals and metrics of the whole step."""

    epoch: float
    """Epochs completed after the step, with the fraction of the current one."""
    batches: Sequence[Batch] = ()
    totals: Mapping[str, float] = field(default_factory=dict[str, float])
    """Name -> summed loss weight over all ranks: what a sum of losses is divided by."""
    tokens: int = 0
    """All tokens of the step over all ranks, in the loss or not."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """Further metrics to log."""


@dataclass(frozen=True)
class Stream:
    """The data of a run, cut into steps. Its cursor is the step's number: nothing else is stored in checkpoints."""

    examples: Examples | Comparisons
    """Samples or comparisons, drawn whole."""
    lengths: np.ndarray
    """Tokens of each sample, int64 [N]."""
    steps: Sequence[StepPlan]
    tokens_per_step: int
    tokens_per_pass: int
    exhausted: dict[int, list[str]]
    """Step (0-based) -> sources with a share that it exhausts in the first epoch while others go on."""

    def __len__(self) -> int:
        return len(self.steps)

    def contents(self, step: int, share: Share = ALONE) -> Contents:
        """One rank's batches of a step, with the totals and metrics of the whole step."""
        passes, totals, tokens = self.passes(step), self.totals(step), self.tokens(step)
        weights = {"weight_per_token": totals["tokens"] / tokens} if "tokens" in totals else totals
        return Contents(
            epoch=self.steps[step].epoch,
            batches=[self.batch(samples) for samples in share.of(passes)],
            totals=totals,
            tokens=tokens,
            metrics={**weights, "fill": tokens / self.tokens_per_step, "passes": len(passes)},
        )

    def batches(self, step: int, share: Share = ALONE) -> Sequence[Batch]:
        """One rank's batches of a step; it may get none when there are fewer passes than ranks."""
        return self.contents(step, share).batches

    def origins(self, step: int) -> list[str]:
        """`file:line` of the step's rows."""
        return [self.examples.origin(index) for index in self.steps[step].samples.tolist()]

    def passes(self, step: int) -> list[list[int]]:
        """The samples of each pass of a step over all ranks, fullest pass first."""
        samples = self.steps[step].samples
        lengths = self.lengths[samples]
        groups = pack(lengths.tolist(), self.tokens_per_pass)
        # passes of like size stand side by side, and are dealt to different ranks
        groups.sort(key=lambda group: -int(lengths[group].sum()))
        return [samples[group].tolist() for group in groups]

    def batch(self, samples: Sequence[int]) -> Batch:
        """The samples of these indices as one packed row."""
        return gather(self.examples, samples)

    def totals(self, step: int) -> dict[str, float]:
        """Summed weights of a step over all ranks, by name: of target `tokens`, or of `pairs` and `answers`."""
        return self.examples.totals(self.steps[step].samples.tolist())

    def tokens(self, step: int) -> int:
        """All tokens of a step, in the loss or not."""
        return int(self.lengths[self.steps[step].samples].sum())

    def tokens_until(self, step: int) -> int:
        """All tokens of the first so many steps."""
        return sum(map(self.tokens, range(step)))


def make_stream(
    examples: Examples | Comparisons,
    *,
    tokens_per_step: int,
    tokens_per_pass: int,
    epochs: float,
    seed: int,
    sources: Sequence[Source] = (),
    short_rows: ShortRows | None = None,
) -> Stream:
    """Plan a whole run. sources: of the samples; where they, or short rows, have shares, the order keeps to them."""
    lengths, parts = examples.lengths, examples.sources
    shares = [source.share for source in sources if source.share is not None]
    names = [source.path for source in sources]
    if short_rows is not None:
        if not shares:  # all rows are shuffled together, as one source
            parts, shares, names = np.zeros_like(parts), [1.0], ["all files"]
        parts, shares = strata(lengths, parts, shares, short_rows.below, short_rows.share)
        names = [f"{name} ({part})" for name in names for part in _length_names(short_rows)]
    order = mixed(lengths, parts, shares, seed) if shares else shuffled(len(lengths), seed)
    steps = plan_steps(lengths, tokens_per_step, order, epochs)
    ends: dict[int, list[str]] = {}
    if len(shares) > 1:
        for source, step in exhausted(steps, parts, len(shares)):
            ends.setdefault(step, []).append(names[source])
    return Stream(examples, lengths, steps, tokens_per_step, tokens_per_pass, ends)


def _length_names(short_rows: ShortRows) -> tuple[str, str]:
    return f"rows of under {short_rows.below:,} tokens", f"rows of {short_rows.below:,} tokens or more"
