"""The one loop: the only caller of `optimizer.step`, the only owner of saving, stopping and logging."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from tuner.config import PackedStage
from tuner.data.batch import Batch
from tuner.data.packing import deal
from tuner.data.stream import Stream
from tuner.errors import UserError
from tuner.training.checkpoint import Checkpoints, generator_state, restore, snapshot
from tuner.training.counters import Counters
from tuner.training.devices import Devices, added
from tuner.training.optimizers import make_optimizer
from tuner.training.run import Run
from tuner.training.schedules import learning_rate
from tuner.training.watchers import Sample, Watchers


class HeldOut(Protocol):
    """What the loop asks about rows that are not trained; every rank asks together."""

    def measure(self) -> dict[str, float]:
        """What the validation rows say: their mean `loss`, and perhaps more; empty without such rows."""
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
    """One optimiser step: its passes on this rank, its global totals, and how it ends."""

    def __init__(
        self, loop: Loop, index: int, passes: int, batches: Sequence[Batch], totals: Mapping[str, float]
    ) -> None:
        self._loop = loop
        self.index = index
        """0-based number of the step."""
        self.passes = passes
        """Passes of the step over all ranks."""
        self.batches = batches
        """This rank's packed rows, on the device; perhaps none."""
        self.totals = totals
        """Name -> summed weight over all ranks, known before the first pass."""
        self.sums: dict[str, torch.Tensor] = {}
        """Name -> this rank's sum so far, divided by its total; `loss` is what is learned from."""
        self._pending: list[torch.Tensor] = []
        self.finished = False

    def add(self, loss_sum: torch.Tensor, per: str, name: str | None = None) -> None:
        """A summed loss of this pass, to be divided by a global total; logged under a `name` of its own, too."""
        loss = loss_sum / self.totals[per]
        self._pending.append(loss)
        self._count("loss", loss)
        if name is not None:
            self._count(name, loss)

    def note(self, name: str, value_sum: torch.Tensor, per: str) -> None:
        """A sum to be divided by a global total and logged, without being learned from."""
        self._count(name, value_sum / self.totals[per])

    def backward(self) -> None:
        """Run the backward pass of what was added since the last."""
        pending, self._pending = self._pending, []
        sum(pending[1:], start=pending[0]).backward()

    def _count(self, name: str, value: torch.Tensor) -> None:
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def finish(self) -> None:
        """Sum gradients over ranks, clip, step, log, evaluate, save."""
        self._loop._finish(self)
        self.finished = True


class Loop:
    """Iterates over the steps of a run, from where it stopped to its end.

    trained: the weights to be trained, by name, in a fixed order.
    """

    def __init__(
        self,
        config: PackedStage,
        run: Run,
        devices: Devices,
        trained: Mapping[str, torch.nn.Parameter],
        stream: Stream,
        held_out: HeldOut,
        watchers: Watchers,
    ) -> None:
        self.config, self.run, self.devices, self.stream = config, run, devices, stream
        self._trained, self._held_out, self._watchers = trained, held_out, watchers
        self._parameters = list(trained.values())
        self.total = min(len(stream.steps), config.max_steps or len(stream.steps))
        self.counters = Counters()
        self._optimizer = make_optimizer(config.optimizer, trained)
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

    def say(self, text: str) -> None:
        """A fact or a warning in words, to the log and to whoever looks on."""
        if self.devices.is_main:
            self.run.log(text)
            self._watchers.message(text)

    def load_best(self) -> None:
        """Put the weights with the best validation loss back, where the config asks for it."""
        if not self.config.evaluation.keep_best or self.counters.best_step in (0, self.counters.step):
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
            step = self._plan(index)
            yield step
            if not step.finished:
                raise RuntimeError("a step must be finished before the next one: call step.finish()")
            if self._stopping:
                break
        if self._last_saved != self.counters.step:
            self._save()

    def _plan(self, index: int) -> Step:
        passes = self.stream.passes(index)
        own = deal(passes, self.devices.rank, self.devices.world)
        batches = [self.stream.batch(samples).to(self.devices.device) for samples in own]
        return Step(self, index, len(passes), batches, self.stream.totals(index))

    def _finish(self, step: Step) -> None:
        self.devices.sum_gradients(self._parameters)
        lr = learning_rate(self.config.schedule, self.config.optimizer.lr, step.index, self.total)
        own = {name: value.item() for name, value in step.sums.items()}
        sums, self._stopping = self._agree(own)
        norm = self._clip()
        good = math.isfinite(norm) and all(math.isfinite(value) for value in sums.values())
        if good:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.counters.count(self.stream.tokens(step.index), good, sums.get("loss"))
        record = self._record(step, sums if good else dict.fromkeys(sums), lr, norm)
        if self._due(self._evaluate_every):
            self._evaluate(record)
        if self.devices.is_main:
            self.run.record(record)
            self._watchers.step(record)
        if not good:
            self._bad_step(step)
        for source in self.stream.exhausted.get(step.index, ()):
            self.say(f"{source} is used up at step {step.index + 1} of this run; the other sources go on")
        if self._due(self.config.checkpoint.every) or self.counters.best_step == self.counters.step:
            self._save()

    def _agree(self, own: dict[str, float]) -> tuple[dict[str, float], int | None]:
        """Losses summed over ranks, and the signal to stop for: if one rank was sent one, all were."""
        everyone = self.devices.gather([(own, self._asked)])
        stopping = max((asked for _, asked in everyone if asked), default=None)
        return added([losses for losses, _ in everyone]), stopping

    def _clip(self) -> float:
        limit = self.config.max_grad_norm or math.inf
        gradients = [parameter for parameter in self._parameters if parameter.grad is not None]
        return torch.nn.utils.clip_grad_norm_(gradients, limit).item() if gradients else 0.0

    def _record(self, step: Step, sums: Mapping[str, float | None], lr: float, norm: float) -> dict[str, Any]:
        seconds = time.perf_counter() - self._started
        tokens = self.stream.tokens(step.index)
        return {
            "step": self.counters.step,
            "tokens": self.counters.tokens,
            **sums,
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
            "epoch": self.stream.steps[step.index].epoch,
            **_shares(step.totals, tokens),
            "fill": tokens / self.config.tokens_per_step,
            "passes": step.passes,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "memory_gib": self.devices.memory_gib(),
            "bad_steps": self.counters.bad_steps,
        }

    def _bad_step(self, step: Step) -> None:
        """A step that is not finite was skipped; too many in a row end the run, with their rows saved."""
        self.say(f"step {step.index + 1}: loss or gradient is not finite; skipped")
        if self.counters.bad_in_a_row < self.config.max_bad_steps:
            return
        folder = self.run.folder / f"bad_step_{step.index + 1:06d}"
        folder.mkdir(exist_ok=True)
        for place, batch in enumerate(step.batches):
            save_file(batch.tensors(), folder / f"rank{self.devices.rank}_pass{place}.safetensors")
        origins = [
            self.stream.examples.origin(index) for index in self.stream.steps[step.index].samples.tolist()
        ]
        (folder / "origins.txt").write_text("\n".join(origins) + "\n", encoding="utf-8")
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
        if measured:
            for said in self.counters.judge(measured["loss"], self.config.evaluation):
                self.say(said)
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


def _shares(totals: Mapping[str, float], tokens: int) -> dict[str, float]:
    """What a step holds beside tokens: weight learned per token, or pairs and answers."""
    if "tokens" in totals:
        return {"weight_per_token": totals["tokens"] / tokens}
    return dict(totals)
