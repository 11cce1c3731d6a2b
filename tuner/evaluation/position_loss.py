"""Loss by position: whether a model that goes on learning still reads what stands far back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tuner.data.batch import Batch, make_batches
from tuner.data.examples import Examples
from tuner.data.packing import deal
from tuner.models.forward import token_logprobs
from tuner.models.roles import Roles
from tuner.training.devices import Devices

FIRST = 256
"""Positions of the first range; each further one goes on to twice as far."""


@dataclass(frozen=True)
class RangeLoss:
    """Loss of the tokens at some positions of their rows."""

    start: int
    end: int
    """One past the last."""
    loss_sum: float
    weight: float

    @property
    def loss(self) -> float:
        """Nats per learned token."""
        return self.loss_sum / self.weight


class HeldOutReplay:
    """Held-out rows of the replay set, on which forgetting shows."""

    def __init__(
        self, examples: Examples | None, roles: Roles, devices: Devices, tokens_per_pass: int
    ) -> None:
        self._roles, self._devices = roles, devices
        self._batches: Sequence[Batch] = [] if examples is None else make_batches(examples, tokens_per_pass)

    def measure(self) -> list[RangeLoss]:
        """The policy's loss by position, ranges without a learned token left out; every rank takes a share."""
        sums: dict[str, float] = {}
        for batch in deal(self._batches, self._devices.rank, self._devices.world):
            batch = batch.to(self._devices.device)
            with self._roles.role("policy") as model:
                logprobs_N, _ = token_logprobs(model, batch)
            _add(sums, batch.positions_T[batch.learned_N], -logprobs_N, batch.weights_N)
        totals = self._devices.sum(sums)
        numbers = sorted(int(name.removeprefix("loss ")) for name in totals if name.startswith("loss "))
        return [
            RangeLoss(*_range(number), totals[f"loss {number}"], totals[f"weight {number}"])
            for number in numbers
        ]


def mean_loss(ranges: Sequence[RangeLoss]) -> float | None:
    """Over all positions; None without any."""
    weight = sum(one.weight for one in ranges)
    return sum(one.loss_sum for one in ranges) / weight if weight else None


def by_position(before: Sequence[RangeLoss], after: Sequence[RangeLoss]) -> list[dict[str, float]]:
    """Two measurements side by side, as results.json has them."""
    return [
        {"from": one.start, "to": one.end, "before": one.loss, "after": other.loss}
        for one, other in zip(before, after, strict=True)
    ]


def _add(
    sums: dict[str, float], positions_N: torch.Tensor, losses_N: torch.Tensor, weights_N: torch.Tensor
) -> None:
    numbers_N = torch.bucketize(positions_N, _borders(int(positions_N.max())).to(positions_N), right=True)
    for number in numbers_N.unique().tolist():
        chosen_N = numbers_N == number
        weight = weights_N[chosen_N].double()
        loss = (losses_N[chosen_N].double() * weight).sum().item()
        sums[f"loss {number}"] = sums.get(f"loss {number}", 0.0) + loss
        sums[f"weight {number}"] = sums.get(f"weight {number}", 0.0) + weight.sum().item()


def _borders(last: int) -> torch.Tensor:
    """Where ranges end: FIRST, and twice, four times as far, beyond the last position."""
    borders = [FIRST]
    while borders[-1] <= last:
        borders.append(2 * borders[-1])
    return torch.tensor(borders)


def _range(number: int) -> tuple[int, int]:
    return (0 if number == 0 else FIRST << (number - 1)), FIRST << number
