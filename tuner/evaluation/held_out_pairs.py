"""Held-out preferences: their loss, and the scores of all their answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tuner.config import FocalRanking, PairEvaluation
from tuner.data.batch import make_batches
from tuner.data.comparisons import Comparisons
from tuner.data.packing import deal
from tuner.data.subset import stratified_subset
from tuner.models.forward import scores
from tuner.models.pair_sums import pair_sums
from tuner.models.roles import Roles
from tuner.models.scorer import score_sequences
from tuner.training.devices import Devices
from tuner.training.watchers import Sample


class HeldOutPairs:
    """Measures a reward model on one set of rows; every rank takes a share, all get the result."""

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
        self._batches = make_batches(comparisons, tokens_per_pass) if comparisons is not None else []

    def measure(self) -> dict[str, float]:
        """Mean `loss` as in training, and `accuracy` over the pairs; empty without rows."""
        if not self._batches:
            return {}
        sums = dict.fromkeys(("ranking", "penalty", "right", "pairs", "answers"), 0.0)
        for batch in deal(self._batches, self._devices.rank, self._devices.world):
            assert batch.pairs is not None
            with self._roles.role("reward") as model:
                batch = batch.to(self._devices.device)
                compared = pair_sums(scores(model, batch), batch, self._loss)
            for name in ("ranking", "penalty", "right"):
                sums[name] += getattr(compared, name).item()
            sums["pairs"] += batch.pairs.weights_P.sum().item()  # type: ignore[union-attr]
            sums["answers"] += batch.weights_N.sum().item()
        totals = self._devices.sum(sums)
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
    """Score of every answer, float64 [N]; every rank scores a share, all get all. advance: told how many of its own."""
    sequences = comparisons.sequences
    own = deal(range(len(sequences)), devices.rank, devices.world)
    tokens = [sequences.example(index)[0] for index in own]
    with roles.role("reward") as model:
        found = score_sequences(model, tokens, tokens_per_pass, devices.device, advance)
    result = np.zeros(len(sequences))
    for indices, values in devices.gather([(own, found)]):
        result[indices] = values
    return result
