"""Replay: pre-training or SFT rows trained on beside each step's rollout, in proportion to its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tuner.config import Source
from tuner.data.batch import Batch, gather
from tuner.data.examples import Examples
from tuner.data.packing import Share, mixed, pack, shuffled


@dataclass(frozen=True)
class ReplayStream:
    """Rows in shuffled order over an unlimited number of epochs, drawn in proportion to the tokens of rollouts."""

    examples: Examples
    sources: Sequence[Source]
    """Of the rows; where they have shares, the order keeps to them."""
    ratio: float
    """Tokens replayed per token of a rollout."""
    tokens_per_pass: int
    seed: int

    def draw(self, cursor: Mapping[str, float], tokens: int) -> tuple[list[int], dict[str, float]]:
        """Indices of the rows to replay beside a rollout of so many tokens, and the cursor of the next step.

        cursor: `drawn` rows so far, and `owed` tokens that no whole row fitted into; {} at the start. Rows are drawn
        whole while the next one is no longer than what is owed, so that the ratio holds over the run at any row length.
        """
        drawn, owed = int(cursor.get("drawn", 0)), cursor.get("owed", 0.0) + self.ratio * tokens
        rows: list[int] = []
        row = self._row(drawn)
        while self._length(row) <= owed:
            rows.append(row)
            drawn, owed = drawn + 1, owed - self._length(row)
            row = self._row(drawn)
        return rows, {"drawn": drawn, "owed": owed}

    def batches(self, rows: Sequence[int], share: Share) -> list[Batch]:
        """One rank's batches of the drawn rows, packed."""
        groups = pack(list(map(self._length, rows)), self.tokens_per_pass)
        return [gather(self.examples, [rows[index] for index in group]) for group in share.of(groups)]

    def target_weight(self, rows: Sequence[int]) -> float:
        """Summed loss weight of some rows' target tokens, over all ranks."""
        return self.examples.totals(list(rows))["tokens"] if rows else 0.0

    def tokens(self, rows: Sequence[int]) -> int:
        """All tokens of some rows, in the loss or not."""
        return sum(map(self._length, rows))

    def _row(self, number: int) -> int:
        """Index of the row that is drawn at this place of the run."""
        epoch, place = divmod(number, len(self.examples))
        return int(self._order(epoch)[place])

    def _length(self, row: int) -> int:
        offsets = self.examples.offsets  # `lengths` would compute the difference over all rows
        return int(offsets[row + 1] - offsets[row])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # an unlimited number of epochs: keeping their orders would fill the memory of a long run
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
        """The order of the current epoch alone."""
        return {}
