"""Updates of the weights: the optimizer, its learning rates, gradient clipping and sums over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tuner.training.devices import Devices
from tuner.training.loop_settings import LoopSettings
from tuner.training.optimizers import Trained, make_optimizer
from tuner.training.parts import Part, parts_of
from tuner.training.schedules import learning_rate


@dataclass(frozen=True)
class UpdateResult:
    """The outcome of one update."""

    sums: Mapping[tuple[str, str], float]
    """The values given to `apply`, by name and divisor, summed over all ranks."""
    grad_norms: Mapping[str, float]
    """L2 norm of the gradients before clipping, by set of weights."""
    applied: bool
    """False where a sum or a norm was not finite: the weights are as before."""


class Updater:
    """The sets of trained weights, and the optimizer that steps them; the only caller of `optimizer.step`."""

    def __init__(
        self,
        trained: Mapping[str, Trained],
        settings: LoopSettings,
        total_steps: int,
        devices: Devices,
    ) -> None:
        self._sets, self._settings, self._total_steps, self._devices = trained, settings, total_steps, devices
        self._parts = {name: parts_of(weights.parameters) for name, weights in trained.items()}
        self.optimizer = make_optimizer(
            settings.optimizer,
            *({name: part.own for name, part in parts.items()} for parts in self._parts.values()),
        )
        self.parts: dict[str, Part] = {
            self._name(set_name, name): part
            for set_name, parts in self._parts.items()
            for name, part in parts.items()
        }
        """This process's parts of all trained weights; of several sets each begins with the name of its set."""

    def apply(
        self, step: int, sums: Mapping[tuple[str, str], torch.Tensor], sets: Sequence[str] = ()
    ) -> UpdateResult:
        """Sum gradients over ranks, clip them, step the optimizer, and clear them.

        step: 0-based, for the learning rate. sums: this rank's values to be summed over ranks, by name and divisor.
        sets: those that have gradients; empty: all. Nothing is stepped where a sum or a gradient norm is not finite.
        """
        by_set = {
            name: list(parts.values()) for name, parts in self._parts.items() if not sets or name in sets
        }
        # gradients in shards are summed on the device: what waits for them first must be seen to wait for other ranks
        self._devices.synchronize()
        self._sum_gradients([part for parts in by_set.values() for part in parts])
        summed = self._devices.sum({name: value.item() for name, value in sums.items()})
        # after the sum: clipped rank by rank, the result would depend on how rows are dealt
        grad_norms = {name: self._clip(parts) for name, parts in by_set.items()}
        # both are sums over ranks, so that all ranks decide alike
        applied = all(math.isfinite(value) for value in (*grad_norms.values(), *summed.values()))
        if applied:
            rates = list(self.learning_rates(step).values())
            for group in self.optimizer.param_groups:
                group["lr"] = rates[group.get("set", 0)]
            self.optimizer.step()
        for part in self.parts.values():
            part.clear_gradient()
        return UpdateResult(summed, grad_norms, applied)

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold trained weights together; the same in all."""
        return any(part.rows is not None for part in self.parts.values())

    def learning_rates(self, step: int) -> dict[str, float]:
        """The learning rate of every set of weights at a 0-based step; 0 where it is not trained yet."""
        return {name: self._learning_rate(weights, step) for name, weights in self._sets.items()}

    def by_set(self, name: str, values: Mapping[str, float]) -> dict[str, float | None]:
        """Values of the sets by their keys in a record: `name_SET`, or plain `name` where there is a single set."""
        if len(self._sets) == 1:
            return {name: next(iter(values.values()), None)}
        return {f"{name}_{set_name}": value for set_name, value in values.items()}

    def _learning_rate(self, weights: Trained, step: int) -> float:
        if step < weights.start:
            return 0.0
        steps, total = step - weights.start, self._total_steps - weights.start
        return learning_rate(self._settings.schedule, weights.lr, steps, total)

    def _sum_gradients(self, parts: Sequence[Part]) -> None:
        """Let every part have its gradient, summed over the ranks."""
        for part in parts:
            part.take_gradient()
        self._devices.sum_gradients([part.own for part in parts if part.rows is None])
        # those in shards were summed over the ranks that hold them together, pass by pass
        self._devices.sum_over_replicas([part.own for part in parts if part.rows is not None])

    def _clip(self, parts: Sequence[Part]) -> float:
        # inf: without clipping the norm is still measured, as it decides whether the update is applied
        limit = self._settings.max_grad_norm or math.inf
        whole, in_shards = (
            [part.own.grad for part in parts if part.own.grad is not None and (part.rows is None) == is_whole]
            for is_whole in (True, False)
        )
        norm = get_total_norm(whole)
        if any(part.rows is not None for part in parts):
            squares = self._devices.sum_over_shards(get_total_norm(in_shards) ** 2)
            norm = (norm.to(squares.device) ** 2 + squares).sqrt()
        clip_grads_with_norm_([part.own for part in parts], limit, norm)
        return norm.item()

    def _name(self, set_name: str, name: str) -> str:
        return name if len(self._sets) == 1 else f"{set_name}.{name}"
