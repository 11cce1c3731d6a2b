"""A job: a run that is being trained, on its devices, with those who look on. Every stage is given one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuner.config import SFT, Chat, PackedConfig, RewardModel, SingleModelConfig, Text
from tuner.data.dataset import Dataset, Progress
from tuner.data.examples import Examples
from tuner.data.stream import Stream
from tuner.data.template import Template
from tuner.display.progress import reading_bar
from tuner.evaluation.held_out_chat import HeldOutRows
from tuner.models.adapters import has_score
from tuner.models.chat import end_ids
from tuner.models.checkpointing import recompute_activations
from tuner.models.load import load_model
from tuner.models.probe import prove_isolation
from tuner.models.roles import Roles
from tuner.models.save import save_model
from tuner.stages.rows import load_rows
from tuner.stages.run import Run
from tuner.training.checkpoint import write_atomically
from tuner.training.devices import Devices
from tuner.training.loop import HeldOut, Loop
from tuner.training.optimizers import Trained
from tuner.training.watchers import Watchers

Measured = dict[str, float | None]
"""Score (0..1) and loss (nats per learned token) of held-out rows; None where there is nothing to measure."""


@dataclass(frozen=True)
class Job:
    """What a stage works with beside its config."""

    run: Run
    devices: Devices
    watchers: Watchers

    def load_roles(self, config: PackedConfig, role: str) -> Roles:
        """The stage's model on this rank's device, in its role, proven to keep packed samples apart."""
        loaded = load_model(
            config.model,
            precision=config.precision,
            device=self.devices.device,
            adapter=config.adapter,
            freeze=config.freeze,
            seed=config.seed,
            head="score" if isinstance(config, RewardModel) else "language",
        )
        if self.devices.is_main:
            self.run.check_same("base", loaded.base.fingerprint, path=loaded.base.path)
        prove_isolation(loaded, self.devices.device, self.devices.autocast())
        if config.gradient_checkpointing:
            recompute_activations(loaded.model)
        torch.manual_seed(config.seed + self.devices.rank)  # dropout
        return Roles.of(role, loaded, self.devices.autocast)

    def load_data(self, config: SingleModelConfig, roles: Roles) -> Dataset[Any]:
        """The rows of the config, tokenised once for all ranks; refuses to go on with other rows than before."""
        with self.reading() as progress:
            data = load_rows(config, roles.tokenizer, progress=progress)
        if self.devices.is_main:
            self.run.check_same("data", data.fingerprint, report=data.report.to_dict())
            self.run.log(str(data.report))
        return data

    @contextmanager
    def reading(self) -> Iterator[Progress]:
        """Rows are read: the main process goes first and shows how far it is, the others find the cache."""
        with self.devices.main_first():
            if not self.devices.is_main:
                yield lambda done: None
                return
            with reading_bar() as progress:
                yield progress

    def loop(self, config: PackedConfig, roles: Roles, stream: Stream, held_out: HeldOut) -> Loop:
        """The run's loop over the weights that are trained, set to where it stopped."""
        trained = {"all": Trained(roles.trained(), config.optimizer.lr)}
        return Loop(config, self.run, self.devices, trained, stream, held_out, self.watchers)

    def held_out(self, config: SFT, roles: Roles, rows: Examples | None) -> HeldOutRows:
        """Rows the policy is measured on."""
        return held_out_rows(config, roles, self.devices, rows)

    def measure_before(self, rows: HeldOutRows, loop: Loop) -> Measured:
        """Loss and score before the first step; a run that goes on has them in its before.json."""
        if loop.counters.step:
            return self.run.kept("before") or {"score": None, "loss": None}
        measured = self.measure("before", rows, loop)
        if self.devices.is_main:
            self.run.keep("before", measured)
        return measured

    def measure(self, when: str, rows: HeldOutRows, loop: Loop) -> Measured:
        """Loss and score of held-out rows now."""
        measured = {"score": rows.score(), "loss": rows.loss()}
        told = ", ".join(f"{key} {value:.4f}" for key, value in measured.items() if value is not None)
        loop.say(f"{when} training: {told or 'no test rows to measure'}")
        return measured

    def finish(
        self,
        template: str | None,
        roles: Roles,
        results: dict[str, Any],
        beside: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Write the model of the first role, with what else is to stand beside it, and the results: the run is over.

        template: in which it was taught to talk; None: in none.
        """

        def write(folder: Path) -> None:
            save_model(roles.loaded, folder)
            beside(folder)

        if self.devices.is_main:
            if template is not None:  # whoever loads the model talks to it as it was taught
                talk, transformer = Template(template, roles.tokenizer), roles.loaded.transformer
                roles.tokenizer.chat_template = talk.source
                if not has_score(transformer):
                    ends = sorted(end_ids(talk, roles.tokenizer))
                    transformer.generation_config.eos_token_id = ends
            write_atomically(self.run.model_folder, write)
            self.run.draw_curves()
            self.run.finish(results)
        self.devices.wait()


def template_of(config: SingleModelConfig) -> str | None:
    """The chat template of a stage's rows; None of raw text."""
    return None if isinstance(config.data, Text) else config.data.template


def held_out_rows(config: SFT, roles: Roles, devices: Devices, rows: Examples | None) -> HeldOutRows:
    """Rows a policy is measured on, in the way of its config."""
    ends = frozenset({roles.tokenizer.eos_token_id} - {None})
    if isinstance(config.data, Chat):
        ends = end_ids(Template(config.data.template, roles.tokenizer), roles.tokenizer)
    return HeldOutRows(rows, roles, devices, config.evaluation, config.tokens_per_pass, ends)
