"""Held-out preferences: a reward model's loss and accuracy on them, and the scores of all their answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tuner.config import FocalRanking, PairEvaluation
from tuner.data.batch import gather, pack_all
from tuner.data.comparisons import Comparisons
from tuner.data.subset import stratified_subset
from tuner.models.forward import scores
from tuner.models.pair_sums import pair_sums
from tuner.models.roles import Roles
from tuner.models.scorer import score_sequences
from tuner.training.devices import Devices
from tuner.training.watchers import Sample


class HeldOutPairs:
    """Measures a reward model on one set of rows. Every rank computes a share of the rows; all ranks get the result."""

    def __init__(
        self,
        comparisons: Comparisons | None,
        roles: Roles,
        devices: Devices,
        evaluation: PairEvaluation,
        loss: FocalRanking,
        tokens_per_pass: int,
    ) -> None:
        comparisons = stratified_subset(comparisons, evaluation.rows)
        self._roles, self._devices, self._loss = roles, devices, loss
        self._comparisons = comparisons
        self._passes = [] if comparisons is None else pack_all(comparisons.lengths, tokens_per_pass)

    @property
    def tokens(self) -> int:
        """Tokens that a measurement passes through the model."""
        return 0 if self._comparisons is None else int(self._comparisons.lengths.sum())

    def metrics(self) -> dict[str, float]:
        """Mean `loss` as in training, and `accuracy` over the pairs (a tie counts half); empty without rows."""
        if not self._passes:
            return {}
        assert self._comparisons is not None
        sums: dict[str, float] = dict.fromkeys(("ranking", "penalty", "right", "pairs", "answers"), 0.0)
        for rows in self._devices.share.of(self._passes):
            batch = gather(self._comparisons, rows)
            assert batch.pairs is not None
            with self._roles.role("reward") as model:
                batch = batch.to(self._devices.device)
                compared = pair_sums(scores(model, batch), batch, self._loss)
            for name in ("ranking", "penalty", "right"):
                sums[name] += getattr(compared, name).item()
            sums["pairs"] += batch.pairs.weights_P.sum().item()  # type: ignore[union-attr]
            sums["answers"] += batch.weights_N.sum().item()
        totals = self._devices.sum(sums)
        # Each by its own count, as in training: a row's answers are not twice its pairs.
        ranking, penalty = totals["ranking"] / totals["pairs"], totals["penalty"] / totals["answers"]
        return {"loss": ranking + penalty, "accuracy": totals["right"] / totals["pairs"]}

    def samples(self) -> list[Sample]:
        """None: a reward model does not answer."""
        return []


def score_comparisons(
    comparisons: Comparisons,
    roles: Roles,
    devices: Devices,
    tokens_per_pass: int,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Score of every answer, float64 [N]. Every rank scores a share of the answers; all ranks get all scores.

    advance: called with the number of answers that this rank has scored since its last call.
    """
    sequences = comparisons.sequences
    tokens = [sequences.example(index)[0] for index in range(len(sequences))]
    with roles.role("reward") as model:
        return score_sequences(
            model, tokens, tokens_per_pass, devices.device, advance=advance, by_pass=devices.by_pass
        )
