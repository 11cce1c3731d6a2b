"""Loss by position in the row: shows whether further training costs a model its use of distant context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tuner.data.batch import gather, pack_all
from tuner.data.examples import Examples
from tuner.models.forward import token_logprobs
from tuner.models.roles import Roles
from tuner.training.devices import Devices

FIRST = 256
"""Positions in the first range; each further range ends twice as far from the beginning."""


@dataclass(frozen=True)
class RangeLoss:
    """Loss of the tokens at positions start to end of their rows."""

    start: int
    end: int
    """One past the last."""
    loss_sum: float
    weight: float

    @property
    def loss(self) -> float:
        """Nats per token that the loss is taken on."""
        return self.loss_sum / self.weight


class HeldOutReplay:
    """Held-out rows of the replay set: a rise of their loss is forgetting."""

    def __init__(
        self, examples: Examples | None, roles: Roles, devices: Devices, tokens_per_pass: int
    ) -> None:
        self._roles, self._devices = roles, devices
        self._examples = examples
        self._passes = [] if examples is None else pack_all(examples.lengths, tokens_per_pass)

    @property
    def tokens(self) -> int:
        """Tokens that a measurement passes through the policy."""
        return 0 if self._examples is None else int(self._examples.lengths.sum())

    def losses_by_position(self) -> list[RangeLoss]:
        """The policy's loss by position, without the ranges in which no token counts.

        Every rank computes a share of the rows; all ranks get the result.
        """
        sums: dict[str, float] = {}
        for rows in self._devices.share.of(self._passes):
            assert self._examples is not None
            batch = gather(self._examples, rows).to(self._devices.device)
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
    """Mean loss over all positions, in nats per token; None without any."""
    weight = sum(part.weight for part in ranges)
    return sum(part.loss_sum for part in ranges) / weight if weight else None


def by_position(before: Sequence[RangeLoss], after: Sequence[RangeLoss]) -> list[dict[str, float]]:
    """Two measurements side by side, as results.json has them."""
    return [
        {"from": old.start, "to": old.end, "before": old.loss, "after": new.loss}
        for old, new in zip(before, after, strict=True)
    ]


def _add(
    sums: dict[str, float], positions_N: torch.Tensor, losses_N: torch.Tensor, weights_N: torch.Tensor
) -> None:
    if not len(positions_N):  # an empty pass, which has no last position
        return
    ranges_N = torch.bucketize(positions_N, _borders(int(positions_N.max())).to(positions_N), right=True)
    for number in ranges_N.unique().tolist():
        inside_N = ranges_N == number
        weight = weights_N[inside_N].double()
        loss = (losses_N[inside_N].double() * weight).sum().item()
        sums[f"loss {number}"] = sums.get(f"loss {number}", 0.0) + loss
        sums[f"weight {number}"] = sums.get(f"weight {number}", 0.0) + weight.sum().item()


def _borders(last: int) -> torch.Tensor:
    """Ends of the ranges: FIRST, 2 FIRST, 4 FIRST, ... until one lies beyond the last position."""
    borders = [FIRST]
    while borders[-1] <= last:
        borders.append(2 * borders[-1])
    return torch.tensor(borders)


def _range(number: int) -> tuple[int, int]:
    return (0 if number == 0 else FIRST << (number - 1)), FIRST << number
