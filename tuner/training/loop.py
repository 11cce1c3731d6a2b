"""The one loop over the steps of a run; it alone evaluates, logs, saves, resumes and stops."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file

from tuner.config.evaluation import Validation
from tuner.config.stage_config import TrainingConfig
from tuner.data.packing import Share
from tuner.data.stream import Contents
from tuner.errors import DivergedError
from tuner.training import heartbeat
from tuner.training.checkpoint import Checkpoints, DamagedCheckpointError
from tuner.training.counters import Counters
from tuner.training.devices import Devices
from tuner.training.divergence import diverged, refuse_weights
from tuner.training.evaluation_cost import EvaluationCost, evaluation_interval, interval_sentences
from tuner.training.json_lines import finite
from tuner.training.loop_settings import LoopSettings
from tuner.training.optimizers import Trained
from tuner.training.resume_rules import extension_sentences, reach_sentences
from tuner.training.run_folder import RunFolder
from tuner.training.snapshot import (
    generator_state,
    restore,
    restore_weights,
    set_generator_state,
    snapshot,
)
from tuner.training.step import Step
from tuner.training.stop_signals import StopSignals
from tuner.training.updater import Updater
from tuner.training.watchers import Sample, Watchers


class Steps(Protocol):
    """The steps of a run, each by its number alone."""

    @property
    def exhausted(self) -> Mapping[int, Sequence[str]]:
        """Step (0-based) -> sources whose first epoch ends with it while others go on."""
        ...

    def __len__(self) -> int: ...

    def contents(self, step: int, share: Share) -> Contents:
        """One rank's share of a step, known before the step begins."""
        ...

    def tokens_until(self, step: int) -> int:
        """Tokens of the first so many steps over all ranks; of answers that are sampled, at most so many."""
        ...

    def origins(self, step: int) -> list[str]:
        """`file:line` of the step's rows."""
        ...


class HeldOut(Protocol):
    """Rows on which the model is measured and never trained; every rank makes the same calls."""

    @property
    def tokens(self) -> int:
        """Cost of `metrics` and `samples` over all ranks, in tokens of a forward pass."""
        ...

    def metrics(self) -> dict[str, float]:
        """Measure the held-out rows: means by name, `loss` and perhaps others; empty without such rows."""
        ...

    def samples(self) -> list[Sample]:
        """Answers to a few held-out prompts."""
        ...


class Loop:
    """Iterates over the steps of a run, from its last checkpoint to its end.

    Iterating raises Interrupted when a signal stopped the run, after the step was finished and saved; a step made of
    parts raises it between them, as long as it has updated nothing.
    """

    def __init__(
        self,
        settings: LoopSettings,
        trained: Mapping[str, Trained],
        steps: Steps,
        held_out: HeldOut,
        *,
        config: TrainingConfig,
        run: RunFolder,
        devices: Devices,
        watchers: Watchers,
        write_milestone: Callable[[Path, Path], None],
    ) -> None:
        """trained: sets of weights by name; the name of a single set is not shown. config: only shown to watchers.

        write_milestone: writes the model of a checkpoint to a folder.
        """
        self.total_steps = min(len(steps), settings.max_steps or len(steps))
        self.counters = Counters()
        self._settings, self._steps, self._held_out = settings, steps, held_out
        self._run, self._devices, self._watchers = run, devices, watchers
        self._updater = Updater(trained, settings, self.total_steps, devices)
        self._checkpoints = Checkpoints(
            run.checkpoints_folder, settings.checkpoint.keep, devices, together=self._updater.is_sharded
        )
        self._evaluation_interval = evaluation_interval(
            self.total_steps, held_out.tokens, steps.tokens_until(self.total_steps)
        )
        self._evaluation_cost, self._began = EvaluationCost(), time.perf_counter()
        self._write_milestone = write_milestone
        self._is_suspicious = False
        self._signals = StopSignals(lambda: devices.is_main and run.end_requested)
        sentences = [*self._resume(), *self._extension_sentences()]
        sentences += reach_sentences(settings.max_steps, len(steps), config.epochs)
        sentences += self._milestone_sentences()
        if settings.evaluation.every is None and held_out.tokens:
            sentences += interval_sentences(self.total_steps, self._evaluation_interval)
        # after _resume: trackers continue from the restored step
        watchers.begin(run.folder, config, self.counters.step, self.total_steps)
        if self.counters.step and devices.is_main:
            run.log(f"going on after step {self.counters.step} of {self.total_steps}")
        for sentence in sentences:
            self.say(sentence)
        # a kill may have come between a checkpoint and its milestone
        self._keep_milestones(missing_only=True)

    def __iter__(self) -> Iterator[Step]:
        with self._signals.listening():
            yield from self._remaining_steps()
            self._checkpoints.wait()
            self._note_early_end()
            self._devices.wait()  # the other ranks neither read nor end before the main one has written
        self._signals.raise_if_agreed(self.counters.step, self.total_steps)
        if not self.restores_earlier:
            self._refuse_divergence()

    @property
    def state(self) -> dict[str, Any]:
        """What the stage carries from step to step, as JSON values; saved with every checkpoint."""
        return self.counters.state

    @property
    def restores_earlier(self) -> bool:
        """Whether the run's model is that of an earlier step, which `load_model_step` restores."""
        return self.counters.model_step != self.counters.step

    @property
    def ended_early(self) -> bool:
        """Whether there would be more steps to take."""
        return self.counters.step < self.total_steps

    def stop(self, reason: str) -> None:
        """End the run after the running step, for a reason that the user is told."""
        self.counters.stopped_early = True
        self.say(f"stopping after step {self.counters.step + 1}: {reason}")

    def suspect(self, is_suspicious: bool) -> None:
        """Tell whether the running step shows something going wrong: `roll_back` then does not return to it."""
        self._is_suspicious = is_suspicious

    def roll_back(self, reason: str) -> None:
        """End the run after the running step, with the model of the last saved step at which nothing went wrong."""
        self.counters.stopped_early, good = True, self.counters.good_step
        self.counters.restored_step = good
        where = (
            f"the model becomes that of step {good:,}"
            if good
            else "no checkpoint was saved before it went wrong, so the model stays (checkpoint.every saves more often)"
        )
        self.say(f"stopping after step {self.counters.step + 1}: {reason}; {where}")

    def say(self, text: str) -> None:
        """Write a fact or a warning to the log, and show it to the watchers."""
        if self._devices.is_main:
            self._run.log(text)
            self._watchers.message(text)

    def load_model_step(self) -> None:
        """Restore the weights of the run's model, where that is an earlier step's: the best, or the last sound one."""
        counters = self.counters
        if not self.restores_earlier:
            return
        try:
            saved = self._checkpoints.load(counters.model_step)
        except DamagedCheckpointError as error:
            if not self._settings.checkpoint.skip_damaged:
                raise
            self.say(f"the model is that of the last step, not of step {counters.model_step}: {error}")
            counters.best_step = counters.restored_step = 0
            self._refuse_divergence()
            return
        restore_weights(saved, self._updater.parts)
        is_best = counters.model_step == counters.best_step
        why = f"with the best {self._settings.best_by}" if is_best else "before the alarm"
        self.say(f"the model is that of step {counters.model_step}, {why}")

    # One step

    def _remaining_steps(self) -> Iterator[Step]:
        if self.counters.step:  # a resumed run that is only to end takes no step more
            self._signals.agree(self._devices)
        while self.ended_early and not self.counters.stopped_early and not self._signals.ends:
            index = self.counters.step
            self._started = time.perf_counter()
            heartbeat.now_doing(f"step {index + 1}")
            contents = self._steps.contents(index, self._devices.share)
            self._begun = copy.deepcopy(self.counters.state), generator_state()
            step = Step(
                index,
                contents,
                self._devices,
                self._updater,
                on_finish=self._finish,
                on_part=self._abandon_if_agreed,
            )
            yield step
            if not step.finished:
                raise RuntimeError("a step must be finished before the next one: call step.finish()")
            if self._signals.agreed is not None:
                break
        if self._last_saved != self.counters.step:
            self._save()

    def _abandon_if_agreed(self, step: Step) -> None:
        """Stop for a signal between the parts of a step, as if it had not begun. An update cannot be taken back, so a
        step that has made one is finished first."""
        if step.updates or not self._signals.agree(self._devices) or self._signals.agreed is None:
            return
        # what its parts have changed, such as the moments that normalize rewards: a resumed run takes the step again
        self.counters.state, generators = self._begun
        set_generator_state(generators)
        if self._last_saved != self.counters.step:
            self._save()
        self._checkpoints.wait()
        self._devices.wait()
        self._signals.raise_if_agreed(self.counters.step, self.total_steps)

    def _finish(self, step: Step) -> None:
        means = step.means() if step.is_finite else dict.fromkeys(step.means())
        self.counters.count(step.tokens, step.is_finite, means.get("loss"))
        record = self._record(step, means)
        if self._settings.evaluates_at(self.counters.step, self.total_steps, self._evaluation_interval):
            started = time.perf_counter()
            self._evaluate(record)
            seconds = time.perf_counter() - started
            for sentence in self._evaluation_cost.add(seconds, time.perf_counter() - self._began):
                self.say(sentence)
        self._signals.agree(self._devices)  # after the evaluation, which may take long
        self._checkpoints.settle()
        if self._devices.is_main:
            record = finite(record)
            self._run.record(record)
            self._watchers.step(record)
        if not step.is_finite:
            self._handle_bad_step(step)
        for source in self._steps.exhausted.get(step.index, ()):
            self.say(f"{source} is used up at step {step.index + 1} of this run; the other sources go on")
        # the best weights are held in their checkpoint alone, from which load_model_step reads them at the end
        is_best = self.counters.best_step == self.counters.step
        if is_best or self._settings.saves_at(self.counters.step, self.total_steps):
            self._save()
            self._keep_milestones()

    def _record(self, step: Step, means: Mapping[str, float | None]) -> dict[str, Any]:
        seconds = time.perf_counter() - self._started
        return {
            "step": self.counters.step,
            "tokens": self.counters.tokens,
            **means,
            **self._updater.by_set("lr", self._updater.learning_rates(step.index)),
            **self._updater.by_set("grad_norm", step.grad_norms),
            "epoch": step.epoch,
            **step.metrics,
            "seconds": seconds,
            "tokens_per_second": step.tokens / seconds,
            "memory_gib": self._devices.memory_gib(),
            "bad_steps": self.counters.bad_steps,
        }

    def _handle_bad_step(self, step: Step) -> None:
        """Warn of a skipped update; after too many in a row, save the step's rows and raise UserError."""
        updates = f"updates of {len(step.updates)} were " if len(step.updates) > 1 else ""
        self.say(f"step {step.index + 1}: loss or gradient is not finite; {updates}skipped")
        if self.counters.bad_in_a_row < self._settings.max_bad_steps:
            return
        folder = self._run.folder / f"bad_step_{step.index + 1:06d}"
        folder.mkdir(exist_ok=True)
        for index, batch in enumerate(step.batches):
            save_file(batch.tensors(), folder / f"rank{self._devices.rank}_pass{index}.safetensors")
        origins = "\n".join(self._steps.origins(step.index))
        (folder / "origins.txt").write_text(origins + "\n", encoding="utf-8")
        raise DivergedError(
            f"{self._run.folder}: loss or gradient was not finite for {self.counters.bad_in_a_row} steps in a row; "
            f"the rows of the last are in {folder.name}/; lower optimizer.lr, or look at those rows"
        )

    def _refuse_divergence(self) -> None:
        """Raise DivergedError where what the last step left is no model."""
        counters, folder = self.counters, self._run.folder
        if counters.bad_in_a_row:
            steps = (
                "last step was" if counters.bad_in_a_row == 1 else f"last {counters.bad_in_a_row} steps were"
            )
            raise diverged(folder, f"its {steps} skipped, as loss or gradient was not finite")
        parts = {name: part.own for name, part in self._updater.parts.items()}
        refuse_weights(folder, parts, self._devices.gather)
        if counters.recent and not math.isfinite(counters.recent[-1][1]):
            raise diverged(folder, f"its last validation loss is {counters.recent[-1][1]}")

    def _evaluate(self, record: dict[str, Any]) -> None:
        """Measure the held-out rows into the step's record, decide on early stopping, and draw samples."""
        metrics = self._held_out.metrics()
        record |= {f"eval_{name}": value for name, value in metrics.items()}
        if metrics and isinstance(self._settings.evaluation, Validation):
            for message in self.counters.judge(metrics["loss"], self._settings.evaluation):
                self.say(message)
        else:
            self.counters.losses.clear()  # their mean is only compared with a validation loss
        measure = getattr(self._settings.evaluation, "keep_best", None)
        if isinstance(measure, str):
            self.counters.keep_best(metrics[measure])
        samples = self._held_out.samples()
        if samples and self._devices.is_main:
            self._run.record_samples(self.counters.step, samples)
            self._watchers.samples(self.counters.step, samples)

    # Saving and resuming

    def _resume(self) -> list[str]:
        """Restore the newest checkpoint, and forget the records after it; returns what the user must know of it."""
        self._checkpoints.tidy()
        _, saved, sentences = self._checkpoints.load_newest(self._settings.checkpoint.skip_damaged)
        if saved is not None:
            counters = restore(saved, self._updater.parts, self._updater.optimizer, self._devices.rank)
            self.counters = Counters(**counters)
        self._last_saved = self.counters.step
        if self._devices.is_main:
            sentences += self._run.rewind(self.counters.step)
        return sentences

    def _extension_sentences(self) -> list[str]:
        """Sentences on a run that is longer than it was when it was begun."""
        step = self.counters.step
        record = next((record for record in reversed(self._run.metrics) if record["step"] == step), None)
        if not self._run.extension or record is None:
            return []
        if self.counters.stopped_early:
            return ["this run stopped early by its own measure, so it does not go on for being longer"]
        return extension_sentences(
            self._run.extension,
            record,
            total_steps=self.total_steps,
            rates=self._updater.by_set("lr", self._updater.learning_rates(step)),
            epoch=self._steps.contents(step - 1, self._devices.share).epoch,
        )

    def _milestone_sentences(self) -> list[str]:
        """Sentences on milestones that the run will not reach, or has passed without them."""
        sentences: list[str] = []
        for name, step in self._settings.checkpoint.milestone_steps(self.total_steps).items():
            if step > self.total_steps:
                sentences.append(f"milestone {name}: step {step:,} is beyond the last, {self.total_steps:,}")
            elif step < self.counters.step and not self._run.milestone_folder(name).is_dir():
                sentences.append(f"milestone {name}: step {step:,} is past, so its model is not kept")
        return sentences

    def _note_early_end(self) -> None:
        if not self.ended_early or self._signals.agreed is not None or not self._devices.is_main:
            return
        sentence = self._run.end_early(self.counters.step, self.total_steps)
        if self._signals.ends:
            self.say(sentence)

    def _save(self) -> None:
        self._last_saved = self.counters.step
        if not self._is_suspicious and not self.counters.restored_step:
            self.counters.good_step = self.counters.step
        generators = self._devices.gather([generator_state()])
        self._checkpoints.wait()  # or two snapshots would be in memory at once
        own = None
        if self._checkpoints.writes:
            counters, updater = asdict(self.counters), self._updater
            number, count = self._devices.mesh.place_in_shards if updater.is_sharded else (1, 1)
            own = snapshot(updater.parts, updater.optimizer, generators, counters, number=number, count=count)
        protected = {self.counters.best_step, self.counters.good_step, self.counters.restored_step}
        self._checkpoints.save(self.counters.step, own, protected)

    def _keep_milestones(self, *, missing_only: bool = False) -> None:
        """Keep the model of the checkpoint that was just written, or restored, where it is a milestone's."""
        names = self._settings.milestones_at(self.counters.step, self.total_steps)
        if names:
            self._checkpoints.wait()
        if self._devices.is_main:
            for name in names:
                folder = self._run.milestone_folder(name)
                if not (missing_only and folder.is_dir()):
                    self._write_milestone(self._checkpoints.path(self.counters.step), folder)
                    self.say(f"milestone {name}: the model of step {self.counters.step:,} is {folder}")
        if names:
            self._devices.wait()
