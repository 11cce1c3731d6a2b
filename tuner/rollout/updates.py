"""Updates of a step: the answers and replayed rows that each optimizer step is taken on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.data.batch import Batch
from tuner.data.replay import ReplayStream
from tuner.rollout.experience import Experience, of_learned
from tuner.rollout.rollout import Rollout
from tuner.training.devices import Devices


@dataclass(frozen=True, eq=False)
class Update:
    """Rows of one optimizer step: this rank's share, with the totals over all ranks that losses are divided by."""

    experiences: Sequence[Experience]
    """May hold rows without tokens, where processes that share a model need as many passes of each."""
    replayed: Sequence[Batch]
    totals: dict[str, float]
    """`answer_tokens` and `answers` that losses are taken on, and the summed loss weight of `replay_tokens`."""


def updates(
    rollout: Rollout,
    experiences: Sequence[Experience],
    replay: ReplayStream | None,
    replayed: Sequence[int],
    *,
    epochs: int,
    mini_batches: int,
    devices: Devices,
) -> Iterator[Update]:
    """The updates of a step: `epochs` passes over its mini-batches, with the replayed rows split among all updates.

    replayed: indices of the rows drawn from `replay` for this step; every one is trained on once.
    """
    parts = rollout.mini_batches(mini_batches)
    shares = np.array_split(np.asarray(replayed, dtype=np.int64), len(parts) * epochs)
    for number, share in enumerate(shares):
        part = number % len(parts)
        learned = parts[part][rollout.learned[parts[part]]]
        # From the rollout, which every rank holds whole: all divide by the same totals.
        totals = {
            "answer_tokens": float(rollout.answer_lengths[learned].sum()),
            "answers": float(len(learned)),
        }
        batches: Sequence[Batch] = ()
        if replay is not None and len(share):
            totals["replay_tokens"] = replay.target_weight(share.tolist())
            local = replay.batches(share.tolist(), devices.share)
            batches = [batch.to(devices.device) for batch in local]
        # Rows without a loss are passed through the model only where others wait for as many passes.
        keeps_all = devices.share.equal and len(learned) > 0
        # May be empty on a rank, which takes the step all the same: all join in summing gradients.
        part_experiences = [
            of_learned(experience)
            for experience in experiences
            if experience.row.mini_batch == part and (keeps_all or experience.row.learned_S.any())
        ]
        yield Update(part_experiences, batches, totals)
