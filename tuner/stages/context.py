"""The context a stage trains in: its run, devices and watchers, and the steps that stages share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from tuner.config import Model, PackedConfig, StageConfig, TrainingConfig, override
from tuner.data.dataset import Dataset, Progress
from tuner.data.inspection import errors
from tuner.display.progress import reading_bar
from tuner.models.checkpointing import recompute_activations
from tuner.models.kernels.choice import install_kernels
from tuner.models.load import Head, Loaded, load_model
from tuner.models.positions import Positions
from tuner.models.probe import prove_isolation
from tuner.models.roles import Roles
from tuner.models.save import take_part_in_saving
from tuner.models.sharding import shard
from tuner.models.shared_rows import share_rows
from tuner.models.tiled_mlp import tile_mlps
from tuner.stages.registry import stage_of
from tuner.stages.row_lengths import long_rows
from tuner.stages.run import Run
from tuner.stages.run_models import usable_models, usable_path, write_milestone
from tuner.training.devices import Devices
from tuner.training.divergence import refuse_measures
from tuner.training.loop import HeldOut, Loop, Steps
from tuner.training.loop_settings import LoopSettings
from tuner.training.optimizers import Trained
from tuner.training.watchers import Watchers

Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True)
class Context:
    """What a stage trains with, besides its config."""

    run: Run
    devices: Devices
    watchers: Watchers

    def say(self, text: str) -> None:
        """Write a fact or a warning to the log, and show it to the watchers."""
        if self.devices.is_main:
            self.run.log(text)
            self.watchers.message(text)

    def say_all(self, sentences: Iterable[str]) -> None:
        """Say each of some sentences."""
        for sentence in sentences:
            self.say(sentence)

    def with_usable_models(self, config: Config) -> Config:
        """The config with paths under which the models it names are loaded. All ranks call it together.

        A run is bound to what the user wrote; which checkpoint that was is told by the model's fingerprint.
        """
        changes = usable_models(config, self.say) if self.devices.is_main else {}
        changes = self.devices.gather([changes])[0]
        return override(config, changes) if changes else config

    def usable_model(self, model: Model) -> Model:
        """The same for a single model."""
        path = (
            usable_path(model.path, trust=model.trust_remote_code, say=self.say)
            if self.devices.is_main
            else ""
        )
        return model.model_copy(update={"path": self.devices.gather([path])[0]})

    def load_role(self, config: PackedConfig, role: str, head: Head = "language") -> Roles:
        """Load the config's model in its one role, on this rank's device.

        Raises UserError where the model lets packed samples see each other.
        """
        loaded = load_model(
            config.model,
            precision=config.precision,
            device=self.devices.device,
            adapter=config.adapter,
            freeze=config.freeze,
            seed=config.seed,
            head=head,
            processes=self.devices.mesh.shards,
        )
        if self.devices.is_main:
            self.run.pin("base", loaded.base.fingerprint, path=loaded.base.path)
        self.say_all(loaded.notes)
        if self.devices.mesh.shards is not None:
            shard(loaded, self.devices.mesh.shards)
        # transformers lets packed samples see each other without a warning, and losses look plausible.
        prove_isolation(loaded, self.devices.device, self.devices.autocast())
        self.install_kernels(config, [loaded])
        recompute_activations(loaded.model, config.gradient_checkpointing)
        tile_mlps(loaded.model, config.mlp_tile)
        # After loading: fresh adapters come from the plain seed, so that all ranks start from equal weights.
        self.seed_dropout(config.seed)
        roles = Roles.of(role, loaded, self.devices.autocast)
        self.lay_out(roles)
        return roles

    def install_kernels(self, config: TrainingConfig, models: Sequence[Loaded]) -> None:
        """Have models computed by the kernels that the config names, and record which they are.

        A run that has begun with kernels="auto" goes on with those it chose: others would round otherwise. Raises
        UserError for a kernel that is not there, or does not compute what the plain model does.
        """
        if config.kernels == "plain":
            return
        record = self.run.read_json("kernels") if self.run.has_started else None
        names = None if record is None else record["names"]
        wanted = self.devices.gather([names])[0] if config.kernels == "auto" else config.kernels
        choice = install_kernels(models, config, wanted, self.devices.autocast, self._first_reason)
        if self.devices.is_main and record is None:
            self.run.save_json("kernels", {"names": list(choice.names), "left_out": choice.left_out})
        self.say(str(choice))

    def _first_reason(self, reason: str | None) -> str | None:
        """That of the first process that has any. All call it together."""
        reasons: list[str | None] = self.devices.gather([reason])
        return next((other for other in reasons if other is not None), None)

    def lay_out(self, roles: Roles) -> None:
        """Make the passes of the roles' models those of several processes, as the config says.

        Raises UserError for a model whose rows cannot be.
        """
        if self.devices.mesh.row is not None:
            for loaded in roles.models:
                share_rows(loaded, self.devices.mesh.row)

    def trained(self, config: PackedConfig, roles: Roles) -> dict[str, Trained]:
        """The trained weights of a stage with one role, as one set."""
        return {"all": Trained(roles.trained(), config.optimizer.lr)}

    def seed_dropout(self, seed: int) -> None:
        """Seed dropout per rank: with one seed, all ranks would drop the same places of different rows."""
        torch.manual_seed(seed + self.devices.rank)  # pyright: ignore[reportUnknownMemberType]

    def load_rows(self, config: StageConfig, roles: Roles) -> Dataset[Any]:
        """The tokenized rows of the config. Raises UserError where a resumed run finds other rows than before, and for
        rows that the model cannot read."""
        with self.reading() as progress:
            data = stage_of(config).load_rows(config, roles.tokenizer, progress=progress)
        too_long = long_rows(data, Positions.of(roles.loaded.transformer))
        self.pin_rows(data)
        self.say_all(too_long)
        if self.devices.is_main:
            examples = stage_of(config).examples(data)
            for problem in errors(examples, roles.tokenizer, data.report):
                self.say(f"warning: {problem}")
        return data

    def pin_rows(self, *datasets: Dataset[Any]) -> None:
        """Record the rows' fingerprint in the run, and say what became of them.

        Raises UserError where the run has begun with other rows.
        """
        if not self.devices.is_main:
            return
        reports = [data.report.to_dict() for data in datasets]
        fingerprint = "-".join(data.fingerprint for data in datasets)
        self.run.pin("data", fingerprint, report=reports if len(reports) > 1 else reports[0])
        for data in datasets:  # on the console, too: whoever trains on fewer rows than he has must see it
            self.say(str(data.report))

    @contextmanager
    def reading(self) -> Generator[Progress]:
        """Read rows inside it: the main process first, with a progress bar; the others then find its cache."""
        with self.devices.main_first():
            if not self.devices.is_main:
                yield lambda done: None
                return
            with reading_bar() as progress:
                yield progress

    def loop(
        self, config: TrainingConfig, trained: Mapping[str, Trained], steps: Steps, held_out: HeldOut
    ) -> Loop:
        """The run's training loop, restored from its last checkpoint if there is one."""
        return Loop(
            LoopSettings.of(config),
            trained,
            steps,
            held_out,
            config=config,
            run=self.run,
            devices=self.devices,
            watchers=self.watchers,
            write_milestone=partial(write_milestone, self.run, say=self.say),
        )

    def finish(
        self, results: dict[str, Any], write_model: Callable[[Path], None], model: Loaded | None = None
    ) -> None:
        """Save the model and the results: the run is finished.

        write_model: writes the model's folder. model: the one it writes, which processes may hold together. Raises
        DivergedError, and writes nothing, where a measure after training is not finite.
        """
        refuse_measures(self.run.folder, results)
        if self.devices.is_main:
            write_model(self.run.model_folder)
            self.run.draw_curves()
            # Last: results mark the run as finished, and `train` returns such a run at once.
            self.run.finish(results)
        elif model is not None:
            take_part_in_saving(model)
        self.devices.wait()
