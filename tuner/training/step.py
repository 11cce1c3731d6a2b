"""One step of a run, as a stage's loop sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from tuner.data.stream import Contents
from tuner.training import heartbeat
from tuner.training.devices import Devices
from tuner.training.updater import Updater


class Step:
    """This rank's batches of a step, the step's global totals, and what its passes add up to.

    A step makes one update of the weights, in `finish`, or as many as `update` is called.
    """

    def __init__(
        self,
        index: int,
        contents: Contents,
        devices: Devices,
        updater: Updater,
        on_finish: Callable[[Step], None],
        on_part: Callable[[Step], None],
    ) -> None:
        """on_finish: called after the step's last update: to log, evaluate and save. on_part: after each `part`."""
        self.index = index
        """0-based number of the step."""
        self.epoch = contents.epoch
        self.batches = [batch.to(devices.device) for batch in contents.batches]
        """This rank's packed rows, on the device; perhaps none."""
        self.totals: Mapping[str, float] = contents.totals
        """Name -> summed weight over all ranks, known before the first pass of an update."""
        self.tokens = contents.tokens
        """All tokens of the step over all ranks, whether or not the loss is taken on them."""
        self.metrics: dict[str, float | None] = dict(contents.metrics)
        """Further numbers logged with the step; those of the main rank are written."""
        self.updates: list[dict[str, tuple[float, float]]] = []
        """For each update, by name: the mean over all ranks, and the total that it was divided by."""
        self.grad_norms: Mapping[str, float] = {}
        """Gradient norms of the last update before clipping, by set of weights."""
        self.is_finite = True
        """Whether every loss and gradient was finite, so that every update was applied."""
        self.finished = False
        self._devices, self._updater = devices, updater
        self._on_finish, self._on_part = on_finish, on_part
        self._sums: dict[str, torch.Tensor] = {}
        """Name -> this rank's sum since the last update, divided by its total; gradients are those of `loss`."""
        self._pending: list[torch.Tensor] = []
        """Losses since the last backward pass."""
        self._divisors: dict[str, str] = {}
        """Name of a value since the last update -> the total that it is divided by, of several the step's first."""

    def add(self, loss_sum: torch.Tensor, per: str, name: str | None = None, factor: float = 1.0) -> None:
        """Add a summed loss of this pass to `loss`, divided by the total named `per`, times `factor`.

        name: under which it is logged, too, without the factor.
        """
        # by the global total: gradients of all passes and ranks then add up to those of the mean over the step
        loss = loss_sum / self.totals[per]
        self._pending.append(loss * factor if factor != 1 else loss)
        self._count("loss", self._pending[-1], per)
        if name is not None:
            self._count(name, loss, per)

    def note(self, name: str, value_sum: torch.Tensor, per: str) -> None:
        """Log a sum, divided by the total named `per`; it has no part in the loss."""
        self._count(name, value_sum / self.totals[per], per)

    def backward(self) -> None:
        """Run the backward pass of the losses added since the last."""
        pending, self._pending = self._pending, []
        # autocast would cast what it multiplies, and with it the gradient of a head in fp32 (a reward model's, a
        # critic's), to bf16; layers that are computed again enter their own
        with torch.autocast(self._devices.device.type, enabled=False):
            # one backward pass: the losses of a pass share its graph, which the first of several would free
            sum(pending[1:], start=pending[0]).backward()

    def update(self, *sets: str) -> None:
        """Sum gradients over ranks, clip, and step the optimizer; sets: those that have gradients, empty: all."""
        # by name and divisor, as a rank may know neither: one without a batch has counted nothing, and one with
        # replayed rows alone has counted only those; a gather of the divisors would cost as much as that of the sums
        sums = {(name, self._divisors[name]): value for name, value in self._sums.items()}
        result = self._updater.apply(self.index, sums, sets)
        self.grad_norms = result.grad_norms
        self.is_finite &= result.applied
        self.updates.append(
            {
                name: (
                    sum(value for key, value in result.sums.items() if key[0] == name),
                    # of several divisors, the first total of the step counts
                    next((total for per, total in self.totals.items() if (name, per) in result.sums), 1.0),
                )
                for name in dict.fromkeys(name for name, _ in result.sums)
            }
        )
        self._sums, self._divisors = {}, {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Log the time of a part of the step, in seconds, as `seconds/NAME`. Every rank makes the same parts.

        Raises Interrupted after a part, where a signal stops the run before the step's first update.
        """
        started = time.perf_counter()
        heartbeat.now_doing(f"step {self.index + 1}, {name}")
        yield
        self._devices.synchronize()  # a GPU's work is only queued: its time would count where it is waited for
        key = f"seconds/{name}"
        self.metrics[key] = (self.metrics.get(key) or 0.0) + time.perf_counter() - started
        heartbeat.now_doing(f"step {self.index + 1}")
        self._on_part(self)

    def finish(self) -> None:
        """Update the weights unless `update` was called; then log, evaluate and save where due."""
        if not self.updates:
            self.update()
        self._on_finish(self)
        self.finished = True

    def means(self) -> dict[str, float]:
        """Means over the updates, weighted by their totals; the weight of `loss` is the step's first total that a term
        of it is divided by."""
        values: dict[str, list[tuple[float, float]]] = {}
        for update in self.updates:
            for name, mean_and_total in update.items():
                values.setdefault(name, []).append(mean_and_total)
        return {name: _weighted_mean(of_updates) for name, of_updates in values.items()}

    def _count(self, name: str, value: torch.Tensor, per: str) -> None:
        # detached, or each pass's graph would be held until the update; a tensor, as .item() here would wait
        # for the device at every pass
        value = value.detach()
        # not the one counted first: a rank may have replayed rows alone, or before its others
        self._divisors[name] = min(per, self._divisors.get(name, per), key=list(self.totals).index)
        self._sums[name] = self._sums[name] + value if name in self._sums else value


def _weighted_mean(values: Sequence[tuple[float, float]]) -> float:
    """Mean of (value, weight); a single value as it is, not rounded by a division."""
    if len(values) == 1:
        return values[0][0]
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)
