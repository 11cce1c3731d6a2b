"""Part 6 of a step: which answers, and which replayed rows, each update of the weights learns from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.config import PPO
from tuner.data.batch import Batch
from tuner.data.replay import ReplayStream
from tuner.rollout.experience import Experience
from tuner.rollout.rollout import Rollout
from tuner.training.devices import Devices


@dataclass(frozen=True, eq=False)
class Update:
    """What one optimiser step learns from: this rank's rows, and the totals of all."""

    experiences: Sequence[Experience]
    replayed: Sequence[Batch]
    totals: dict[str, float]
    """`answer_tokens`, and the learned weight of `replay_tokens`."""


def updates(
    rollout: Rollout,
    experiences: Sequence[Experience],
    replay: ReplayStream | None,
    replayed: Sequence[int],
    config: PPO,
    devices: Devices,
) -> Iterator[Update]:
    """The updates of a step: `update_epochs` times through its mini-batches; the replayed rows are split over all."""
    parts = rollout.mini_batches(config.mini_batches)
    shares = np.array_split(np.asarray(replayed, dtype=np.int64), len(parts) * config.update_epochs)
    for number, share in enumerate(shares):
        part = number % len(parts)
        totals = {"answer_tokens": float(rollout.answer_lengths[parts[part]].sum())}
        batches: Sequence[Batch] = ()
        if replay is not None and len(share):
            totals["replay_tokens"] = replay.learned(share.tolist())
            own = replay.batches(share.tolist(), devices.rank, devices.world)
            batches = [batch.to(devices.device) for batch in own]
        yield Update([one for one in experiences if one.row.mini_batch == part], batches, totals)
