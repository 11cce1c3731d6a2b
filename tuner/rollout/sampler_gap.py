"""The gap between the log-probabilities of an external engine and the trainer's own, of the same tokens.

The engine computes with other kernels, and perhaps in another precision: it samples from another distribution than the
one that the losses take the gradient of (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training", 2025). Shapes: N answer tokens of a row.
"""

# torch annotates some of its functions only in part
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from tuner.config import VLLM
from tuner.errors import UserError
from tuner.rollout.experience import Observed
from tuner.rollout.rollout import Rollout
from tuner.training.devices import Devices

CORRECTION = (
    "above engine.max_gap: such steps have truncated importance weights; where it is more than a few tenths, the "
    "server has another base than the run, or another precision"
)
"""What a run says, after the gap, when it first corrects one."""

AnyObserved = TypeVar("AnyObserved", bound=Observed)


@dataclass(frozen=True)
class SamplerGap:
    """Absolute differences of a rollout's log-probabilities, over all ranks, in nats per token."""

    mean: float
    largest: float

    def __str__(self) -> str:
        return f"the server's log-probabilities differ from the trainer's by {self.mean:.3g} nats per token"

    @classmethod
    def of(cls, rollout: Rollout, observed: Sequence[Observed], devices: Devices) -> SamplerGap:
        """The gap of a rollout whose rows, this rank's, the trainer has observed."""
        gaps = [(row.old_N - sampled_logprobs(rollout, row)).abs().double() for row in observed]
        local = [(float(gap_N.sum()), float(gap_N.max()), len(gap_N)) for gap_N in gaps if len(gap_N)]
        sums, maxima, counts = zip(*devices.gather(local), strict=True)
        return cls(math.fsum(sums) / sum(counts), float(np.max(maxima)))  # np.max: a NaN is the largest


def sampled_logprobs(rollout: Rollout, observed: Observed) -> torch.Tensor:
    """The engine's log-probabilities of a row's answer tokens, fp32 [N]."""
    sampled: list[np.ndarray] = [rollout.answers[index].logprobs for index in observed.row.answers.tolist()]
    # an empty one first: a row without answers has none to join
    return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *sampled])).to(observed.old_N)


def corrected(
    rollout: Rollout, observed: Sequence[AnyObserved], gap: SamplerGap, engine: VLLM
) -> Sequence[AnyObserved]:
    """The rows, with the engine's log-probabilities where the gap is above the bound.

    Raises UserError where the config asks for a stop there.
    """
    # a gap that is no number is the trainer's: its losses are not finite either, and the step is skipped for that
    if gap.mean <= engine.max_gap or not math.isfinite(gap.mean):
        return observed
    if engine.above_max_gap == "stop":
        raise UserError(
            f"{gap}, above engine.max_gap={engine.max_gap:g}: does it serve this run's base, in its precision? To go "
            'on from the stored rollout, run the same command with a larger bound, or engine.above_max_gap="truncate"'
        )
    return [replace(row, sampled_N=sampled_logprobs(rollout, row)) for row in observed]
