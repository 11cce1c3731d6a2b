"""A run folder's records during a TRL trainer's loop: what the trainer's callbacks must log, save and stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState

from tuner.errors import DivergedError
from tuner.training.devices import Devices
from tuner.training.run_folder import RunFolder
from tuner.training.schedules import learning_rate
from tuner.training.trl_trainer import RunTrainer
from tuner.training.watchers import Watchers


class RunCallback(TrainerCallback):
    """Writes one record per optimizer step, evaluates and saves when due, and stops on a signal with Interrupted."""

    def __init__(
        self,
        trainer: RunTrainer,
        run: RunFolder,
        devices: Devices,
        watchers: Watchers,
        *,
        validation: Dataset | None,
        evaluation_interval: int,
        on_start: Callable[[], Any],
    ) -> None:
        """validation: rows that are measured as often as the settings say; None: none. evaluation_interval: steps
        between measurements where the settings name none.

        on_start: called before the first step of a new run. (A model that transformers evaluates before `train` is
        taken for prepared, and its ranks are trained apart.)
        """
        self._trainer, self._settings, self._validation = trainer, trainer.settings, validation
        self._evaluation_interval = evaluation_interval
        self._run, self._devices, self._watchers, self._on_start = run, devices, watchers, on_start
        # TRL's own count begins at 0 again when a run resumes
        self._tokens_before = int((run.metrics or [{"tokens": 0}])[-1]["tokens"])
        self._tokens = self._tokens_before

    def on_train_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == 0:
            self._on_start()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        stop = self._trainer.signals.agree(self._devices)
        control.should_log = True
        control.should_save = stop or self._settings.saves_at(state.global_step, state.max_steps)
        control.should_training_stop |= stop

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **__: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # those of an evaluation, or of the whole run
            return
        record = self._record(state, logs)
        is_finite = None not in record.values()
        if is_finite and self._settings.evaluates_at(
            state.global_step, state.max_steps, self._evaluation_interval
        ):
            measures = self._trainer.measure(self._validation)
            record |= {f"eval_{name}": value for name, value in measures.items()}
        if self._devices.is_main:
            self._run.record(record)
            self._watchers.step(record)
        if not is_finite:
            raise DivergedError(
                f"{self._run.folder}: loss or gradient was not finite in step {state.global_step}, and TRL skips no "
                "step; lower optimizer.lr, or look at the rows"
            )

    def on_train_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        self._trainer.signals.raise_if_agreed(state.global_step, state.max_steps)

    def _record(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, Any]:
        seconds = time.perf_counter() - self._started
        before, self._tokens = self._tokens, self._tokens_before + int(logs["num_tokens"])
        schedule, peak = self._settings.schedule, self._settings.optimizer.lr
        record = {
            "step": state.global_step,
            "tokens": self._tokens,
            **{name: logs[key] for name, key in self._trainer.recorded.items()},
            **{name: logs[key] for name, key in self._trainer.recorded_at_times.items() if key in logs},
            "lr": learning_rate(schedule, peak, state.global_step - 1, state.max_steps),
            "grad_norm": logs["grad_norm"],
            "epoch": state.epoch,
            "seconds": seconds,
            "tokens_per_second": (self._tokens - before) / seconds,
            "memory_gib": self._devices.memory_gib(),
        }
        return {name: value if math.isfinite(value) else None for name, value in record.items()}
