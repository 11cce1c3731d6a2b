"""Replayed rows: which of them stand beside a step's rollout, in proportion to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tuner.config import Source
from tuner.data.batch import Batch, gather
from tuner.data.examples import Examples
from tuner.data.packing import deal, mixed, pack, shuffled


@dataclass(frozen=True)
class ReplayStream:
    """Rows in shuffled order over epochs without end, drawn as tokens of rollouts fall due."""

    examples: Examples
    sources: Sequence[Source]
    """Where they come from; with shares, the order keeps to these."""
    ratio: float
    """Tokens replayed per token of a rollout."""
    tokens_per_pass: int
    seed: int

    def draw(self, kept: Mapping[str, float], tokens: int) -> tuple[list[int], dict[str, float]]:
        """Rows to replay beside a rollout of so many tokens, and what is to be kept for the next one.

        kept: `drawn` rows so far, and `owed` tokens that no whole row fitted into; {} at the start. Rows are taken
        whole, while the next one is no longer than what is owed: over the run the ratio is kept, however long they are.
        """
        drawn, owed = int(kept.get("drawn", 0)), kept.get("owed", 0.0) + self.ratio * tokens
        rows, row = [], self._row(drawn)
        while self._length(row) <= owed:
            rows.append(row)
            drawn, owed = drawn + 1, owed - self._length(row)
            row = self._row(drawn)
        return rows, {"drawn": drawn, "owed": owed}

    def batches(self, rows: Sequence[int], rank: int, world: int) -> list[Batch]:
        """One rank's packed rows of some that were drawn."""
        groups = pack(list(map(self._length, rows)), self.tokens_per_pass)
        return [
            gather(self.examples, [rows[place] for place in group]) for group in deal(groups, rank, world)
        ]

    def learned(self, rows: Sequence[int]) -> float:
        """Summed weight of the learned tokens of some rows, over all ranks."""
        return self.examples.totals(list(rows))["tokens"] if rows else 0.0

    def tokens(self, rows: Sequence[int]) -> int:
        """All tokens of some rows, learned or not."""
        return sum(map(self._length, rows))

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, len(self.examples))
        return int(self._order(epoch)[place])

    def _length(self, row: int) -> int:
        offsets = self.examples.offsets  # not lengths: that is a difference over all rows
        return int(offsets[row + 1] - offsets[row])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders.clear()
            shares = [source.share for source in self.sources if source.share is not None]
            order = (
                mixed(self.examples.lengths, self.examples.sources, shares, self.seed)
                if shares
                else shuffled(len(self.examples), self.seed)
            )
            self._orders[epoch] = order(epoch)
        return self._orders[epoch]

    @cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        """The order of the epoch in hand."""
        return {}
