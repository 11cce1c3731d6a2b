"""The one loop: the only caller of `optimizer.step`, the only owner of saving, stopping and logging."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from tuner.config import PPO, PackedConfig, Validation
from tuner.data.stream import Contents
from tuner.errors import UserError
from tuner.training.checkpoint import Checkpoints, generator_state, restore, snapshot
from tuner.training.counters import Counters
from tuner.training.devices import Devices, added
from tuner.training.optimizers import Trained, make_optimizer
from tuner.training.run_folder import Run, finite
from tuner.training.schedules import learning_rate
from tuner.training.watchers import Sample, Watchers


class Steps(Protocol):
    """What a run is made of, by step number alone."""

    exhausted: Mapping[int, Sequence[str]]
    """Step (0-based) -> sources of which it takes the last row of the first epoch while others go on."""

    def __len__(self) -> int: ...

    def contents(self, step: int, rank: int, world: int) -> Contents:
        """What one rank gets of a step, known before the step begins."""
        ...

    def origins(self, step: int) -> list[str]:
        """`file:line` of the step's rows."""
        ...


class HeldOut(Protocol):
    """What the loop asks about rows that are not trained; every rank asks together."""

    def measure(self) -> dict[str, float]:
        """What held-out rows say: their mean `loss`, and perhaps more; empty without such rows."""
        ...

    def samples(self) -> list[Sample]:
        """Answers to a few held-out prompts."""
        ...


class Interrupted(Exception):  # noqa: N818 (an outcome, not an error)
    """A signal asked the run to stop; the step was finished and saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}, saved")
        self.exit_code = 128 + signal_number


class Step:
    """One step of a run: what this rank has of it, its global totals, and how it ends.

    A step has one update of the weights, which `finish` makes, or as many as `update` is called.
    """

    def __init__(self, loop: Loop, index: int, contents: Contents) -> None:
        self._loop = loop
        self.index = index
        """0-based number of the step."""
        self.contents = contents
        self.batches = [batch.to(loop.devices.device) for batch in contents.batches]
        """This rank's packed rows, on the device; perhaps none."""
        self.totals: Mapping[str, float] = contents.totals
        """Name -> summed weight over all ranks, known before the first pass of an update."""
        self.tokens = contents.tokens
        """All tokens of the step over all ranks, learned or not."""
        self.facts: dict[str, float | None] = dict(contents.facts)
        """What else is logged of it, as the main rank has it."""
        self.sums: dict[str, torch.Tensor] = {}
        """Name -> this rank's sum since the last update, divided by its total; `loss` is what is learned from."""
        self.updates: list[dict[str, tuple[float, float]]] = []
        """Of every update, by name: the sum over all ranks, divided by its total, and that total."""
        self.norms: dict[str, float] = {}
        """Gradient norms of the last update, by the set of weights."""
        self.good = True
        """Whether every loss and gradient was finite."""
        self.finished = False
        self._pending: list[torch.Tensor] = []
        self._per: dict[str, str] = {}

    def add(self, loss_sum: torch.Tensor, per: str, name: str | None = None, factor: float = 1.0) -> None:
        """A summed loss of this pass, to be divided by a global total; logged under a `name` of its own, too.

        factor: how much of it is learned; the name's own value is without.
        """
        loss = loss_sum / self.totals[per]
        self._pending.append(loss * factor if factor != 1 else loss)
        self._count("loss", self._pending[-1], per)
        if name is not None:
            self._count(name, loss, per)

    def note(self, name: str, value_sum: torch.Tensor, per: str) -> None:
        """A sum to be divided by a global total and logged, without being learned from."""
        self._count(name, value_sum / self.totals[per], per)

    def backward(self) -> None:
        """Run the backward pass of what was added since the last."""
        pending, self._pending = self._pending, []
        sum(pending[1:], start=pending[0]).backward()

    def _count(self, name: str, value: torch.Tensor, per: str) -> None:
        value = value.detach()
        self._per.setdefault(name, per)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def update(self, *only: str) -> None:
        """Sum gradients over ranks, clip, and step the optimiser; only: the sets of weights that have gradients."""
        self._loop._update(self, only)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the step whose time is logged."""
        started = time.perf_counter()
        yield
        self._loop.devices.settle()  # work of a GPU is only queued: it would count where it is waited for
        key = f"seconds/{name}"
        self.facts[key] = (self.facts.get(key) or 0.0) + time.perf_counter() - started

    def close_update(self, sums: Mapping[str, float]) -> None:
        """Keep what an update came to over all ranks, and begin the next."""
        weights = {name: self.totals.get(per, 1.0) for name, per in self._per.items()}
        self.updates.append({name: (value, weights.get(name, 1.0)) for name, value in sums.items()})
        self.sums = {}

    def means(self) -> dict[str, float]:
        """What the updates came to on average, each counting by its total; `loss` by its first."""
        found: dict[str, list[tuple[float, float]]] = {}
        for update in self.updates:
            for name, one in update.items():
                found.setdefault(name, []).append(one)
        return {name: _mean(values) for name, values in found.items()}

    def finish(self) -> None:
        """Make the step's update if it has had none; log, evaluate, save."""
        self._loop._finish(self)
        self.finished = True


class Loop:
    """Iterates over the steps of a run, from where it stopped to its end.

    trained: the weights to be trained, in sets by name; where there is but one, its name is not shown.
    """

    def __init__(
        self,
        config: PackedConfig | PPO,
        run: Run,
        devices: Devices,
        trained: Mapping[str, Trained],
        steps: Steps,
        held_out: HeldOut,
        watchers: Watchers,
    ) -> None:
        self.config, self.run, self.devices, self.steps = config, run, devices, steps
        self._sets, self._held_out, self._watchers = trained, held_out, watchers
        alone = len(trained) == 1
        self._trained = {
            name if alone else f"{group}.{name}": parameter
            for group, one in trained.items()
            for name, parameter in one.parameters.items()
        }
        self.total = min(len(steps), config.max_steps or len(steps))
        self.counters = Counters()
        self._optimizer = make_optimizer(config.optimizer, *(one.parameters for one in trained.values()))
        self._checkpoints = Checkpoints(run.checkpoints_folder, config.checkpoint.keep)
        self._asked: int | None = None
        """The signal this process was sent, if any."""
        self._stopping: int | None = None
        """The signal all ranks have agreed to stop for."""
        self._resume()
        watchers.begin(run.folder, config, self.counters.step, self.total)
        if self.counters.step and devices.is_main:
            run.log(f"going on after step {self.counters.step} of {self.total}")

    def __iter__(self) -> Iterator[Step]:
        handlers = self._listen()
        try:
            yield from self._steps()
            self._checkpoints.wait()
            self.devices.wait()  # the other ranks neither read nor end before the main one has written
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._stopping and self.counters.step < self.total:
            raise Interrupted(self._stopping, self.counters.step)

    @property
    def kept(self) -> dict[str, Any]:
        """What the stage itself keeps from step to step, as JSON has it; saved with every checkpoint."""
        return self.counters.kept

    def say(self, text: str) -> None:
        """A fact or a warning in words, to the log and to whoever looks on."""
        if self.devices.is_main:
            self.run.log(text)
            self._watchers.message(text)

    def load_best(self) -> None:
        """Put the weights with the best validation loss back, where the config asks for it."""
        if self.counters.best_step in (0, self.counters.step):
            return
        saved = self._checkpoints.load(self.counters.best_step)
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(saved.trained[name])
        self.say(f"the model is that of step {self.counters.best_step}, with the best validation loss")

    # One step

    def _steps(self) -> Iterator[Step]:
        while self.counters.step < self.total and not self.counters.stopped_early:
            index = self.counters.step
            self._started = time.perf_counter()
            step = Step(self, index, self.steps.contents(index, self.devices.rank, self.devices.world))
            yield step
            if not step.finished:
                raise RuntimeError("a step must be finished before the next one: call step.finish()")
            if self._stopping:
                break
        if self._last_saved != self.counters.step:
            self._save()

    def _update(self, step: Step, only: Sequence[str]) -> None:
        sets = {name: one for name, one in self._sets.items() if not only or name in only}
        self.devices.sum_gradients([weight for one in sets.values() for weight in one.parameters.values()])
        own = {name: value.item() for name, value in step.sums.items()}
        sums, self._stopping = self._agree(own)
        step.norms = {name: self._clip(one.parameters.values()) for name, one in sets.items()}
        if all(math.isfinite(value) for value in (*step.norms.values(), *sums.values())):
            rates = list(self._rates(step.index).values())
            for group in self._optimizer.param_groups:
                group["lr"] = rates[group.get("set", 0)]
            self._optimizer.step()
        else:
            step.good = False
        self._optimizer.zero_grad(set_to_none=True)
        step.close_update(sums)

    def _finish(self, step: Step) -> None:
        if not step.updates:
            self._update(step, ())
        losses = step.means() if step.good else dict.fromkeys(step.means())
        self.counters.count(step.tokens, step.good, losses.get("loss"))
        record = self._record(step, losses)
        if self._due(self._evaluate_every):
            self._evaluate(record)
            _, self._stopping = self._agree({})  # asked meanwhile: the next step may take long
        if self.devices.is_main:
            record = finite(record)
            self.run.record(record)
            self._watchers.step(record)
        if not step.good:
            self._bad_step(step)
        for source in self.steps.exhausted.get(step.index, ()):
            self.say(f"{source} is used up at step {step.index + 1} of this run; the other sources go on")
        if self._due(self.config.checkpoint.every) or self.counters.best_step == self.counters.step:
            self._save()

    def _agree(self, own: dict[str, float]) -> tuple[dict[str, float], int | None]:
        """Losses summed over ranks, and the signal to stop for: if one rank was sent one, all were."""
        everyone = self.devices.gather([(own, self._asked)])
        stopping = max((asked for _, asked in everyone if asked), default=None)
        return added([losses for losses, _ in everyone]), stopping

    def _clip(self, parameters: Iterable[torch.nn.Parameter]) -> float:
        limit = self.config.max_grad_norm or math.inf
        gradients = [parameter for parameter in parameters if parameter.grad is not None]
        return torch.nn.utils.clip_grad_norm_(gradients, limit).item() if gradients else 0.0

    def _rates(self, step: int) -> dict[str, float]:
        """The learning rate of every set of weights; 0 where it is not trained yet."""
        return {
            name: learning_rate(self.config.schedule, one.lr, step - one.start, self.total - one.start)
            if step >= one.start
            else 0.0
            for name, one in self._sets.items()
        }

    def _record(self, step: Step, losses: Mapping[str, float | None]) -> dict[str, Any]:
        seconds = time.perf_counter() - self._started
        return {
            "step": self.counters.step,
            "tokens": self.counters.tokens,
            **losses,
            **self._by_set("lr", self._rates(step.index)),
            **self._by_set("grad_norm", step.norms),
            "epoch": step.contents.epoch,
            **step.facts,
            "seconds": seconds,
            "tokens_per_second": step.tokens / seconds,
            "memory_gib": self.devices.memory_gib(),
            "bad_steps": self.counters.bad_steps,
        }

    def _by_set(self, name: str, values: Mapping[str, float | None]) -> dict[str, float | None]:
        """A value of every set of weights under names of their own; of the only one under the plain name."""
        if len(self._sets) == 1:
            return {name: next(iter(values.values()), None)}
        return {f"{name}_{group}": value for group, value in values.items()}

    def _bad_step(self, step: Step) -> None:
        """An update that is not finite was skipped; too many in a row end the run, with their rows saved."""
        updates = f"updates of {len(step.updates)} were " if len(step.updates) > 1 else ""
        self.say(f"step {step.index + 1}: loss or gradient is not finite; {updates}skipped")
        if self.counters.bad_in_a_row < self.config.max_bad_steps:
            return
        folder = self.run.folder / f"bad_step_{step.index + 1:06d}"
        folder.mkdir(exist_ok=True)
        for place, batch in enumerate(step.batches):
            save_file(batch.tensors(), folder / f"rank{self.devices.rank}_pass{place}.safetensors")
        (folder / "origins.txt").write_text(
            "\n".join(self.steps.origins(step.index)) + "\n", encoding="utf-8"
        )
        raise UserError(
            f"{self.run.folder}: loss or gradient was not finite for {self.counters.bad_in_a_row} steps in a row; "
            f"the rows of the last are in {folder.name}/; lower optimizer.lr, or look at those rows"
        )

    # Held-out rows

    @property
    def _evaluate_every(self) -> int:
        return self.config.evaluation.every or max(1, self.total // 10)

    def _due(self, every: int | None) -> bool:
        return self.counters.step == self.total or (every is not None and self.counters.step % every == 0)

    def _evaluate(self, record: dict[str, Any]) -> None:
        measured = self._held_out.measure()
        record |= {f"eval_{name}": value for name, value in measured.items()}
        if measured and isinstance(self.config.evaluation, Validation):
            for said in self.counters.judge(measured["loss"], self.config.evaluation):
                self.say(said)
        else:
            self.counters.losses.clear()  # nobody asks for their mean
        samples = self._held_out.samples()
        if samples and self.devices.is_main:
            self.run.record_samples(self.counters.step, samples)
            self._watchers.samples(self.counters.step, samples)

    # Saving and going on

    def _resume(self) -> None:
        self._checkpoints.tidy()
        steps = self._checkpoints.steps()
        self._last_saved = 0
        if not steps:
            if self.devices.is_main:
                self.run.rewind(0)
            return
        counters = restore(
            self._checkpoints.load(steps[-1]), self._trained, self._optimizer, self.devices.rank
        )
        self.counters = Counters(**counters)
        self._last_saved = self.counters.step
        self.devices.wait()
        if self.devices.is_main:
            self.run.rewind(self.counters.step)

    def _save(self) -> None:
        self._last_saved = self.counters.step
        generators = self.devices.gather([generator_state()])
        if self.devices.is_main:
            self._checkpoints.wait()  # or two snapshots would lie in memory at once
            copy = snapshot(self._trained, self._optimizer, generators, asdict(self.counters))
            self._checkpoints.save(self.counters.step, copy, protected={self.counters.best_step})

    def _listen(self) -> dict[int, Any]:
        """Take SIGINT and SIGTERM as requests to finish the step; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {
            number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _ask_to_stop(self, number: int, _: FrameType | None) -> None:
        if self._asked == signal.SIGINT == number:
            raise KeyboardInterrupt  # a second Ctrl-C will not wait
        self._asked = number


def _mean(values: Sequence[tuple[float, float]]) -> float:
    """Of (value, weight); one alone as it is, without a rounding."""
    if len(values) == 1:
        return values[0][0]
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)
