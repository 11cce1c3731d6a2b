"""Updates of the weights: the optimizer, its learning rates, gradient clipping and sums over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tuner.training.devices import Devices
from tuner.training.loop_settings import LoopSettings
from tuner.training.optimizers import Trained, make_optimizer
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
        self.optimizer = make_optimizer(
            settings.optimizer, *(weights.parameters for weights in trained.values())
        )
        self.parameters: dict[str, torch.nn.Parameter] = {
            self._name(set_name, name): parameter
            for set_name, weights in trained.items()
            for name, parameter in weights.parameters.items()
        }
        """All trained weights; of several sets each begins with the name of its set."""

    def apply(
        self, step: int, sums: Mapping[tuple[str, str], torch.Tensor], sets: Sequence[str] = ()
    ) -> UpdateResult:
        """Sum gradients over ranks, clip them, step the optimizer, and clear them.

        step: 0-based, for the learning rate. sums: this rank's values to be summed over ranks, by name and divisor.
        sets: those that have gradients; empty: all. Nothing is stepped where a sum or a gradient norm is not finite.
        """
        weights = {name: part for name, part in self._sets.items() if not sets or name in sets}
        self._devices.sum_gradients(
            [parameter for part in weights.values() for parameter in part.parameters.values()]
        )
        summed = self._devices.sum({name: value.item() for name, value in sums.items()})
        # after the sum: clipped rank by rank, the result would depend on how rows are dealt
        grad_norms = {name: self._clip(part.parameters.values()) for name, part in weights.items()}
        # both are sums over ranks, so that all ranks decide alike
        applied = all(math.isfinite(value) for value in (*grad_norms.values(), *summed.values()))
        if applied:
            rates = list(self.learning_rates(step).values())
            for group in self.optimizer.param_groups:
                group["lr"] = rates[group.get("set", 0)]
            self.optimizer.step()
        # None and not zeros: a set that has no gradients in an update is then left alone by the optimizer,
        # which at zeros would still move it by momentum and weight decay
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateResult(summed, grad_norms, applied)

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

    def _clip(self, parameters: Iterable[torch.nn.Parameter]) -> float:
        # inf: without clipping the norm is still measured, as it decides whether the update is applied
        limit = self._settings.max_grad_norm or math.inf
        gradients = [parameter for parameter in parameters if parameter.grad is not None]
        return torch.nn.utils.clip_grad_norm_(gradients, limit).item() if gradients else 0.0

    def _name(self, set_name: str, name: str) -> str:
        return name if len(self._sets) == 1 else f"{set_name}.{name}"
