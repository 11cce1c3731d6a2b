"""The door to TRL: any of its trainers on rows of tokens, with a run folder's checkpoints and records.

A checkpoint is TRL's folder `checkpoint-120`, except for the trained weights: a safetensors file with the model's
names. Optimizer, schedule and generators are pickles by torch.save, read with `weights_only`. checksums.json, written
last, holds hashes of all files; a folder that a kill left unfinished has none, and is removed.
Resuming is as good as transformers': weights, optimizer, order of the rows and generators are restored.
"""

from __future__ import annotations

import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from tuner.config.stage_config import TrainingConfig
from tuner.errors import UserError
from tuner.models.adapters import is_adapted
from tuner.models.load import Loaded
from tuner.models.quantization import bitsandbytes
from tuner.models.save import disk_errors
from tuner.models.unwrap import unwrapped
from tuner.training.checkpoint import damaged, newest_sound
from tuner.training.checkpoint_names import CHECKSUMS, TRAINED
from tuner.training.devices import Devices
from tuner.training.loop_settings import LoopSettings
from tuner.training.optimizers import make_optimizer
from tuner.training.pair_plan import PairPlan
from tuner.training.run_folder import RunFolder
from tuner.training.schedules import learning_rate
from tuner.training.seal import BrokenSealError, seal, sealed_values
from tuner.training.stop_signals import StopSignals

bitsandbytes()  # transformers' Trainer imports it, with the advice this door leaves out

import transformers  # noqa: E402


@contextmanager
def without_deprecations() -> Iterator[None]:
    """Hide that TRL and transformers use names that transformers 5.23 deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class LearnedTokens:
    """A collator of TRL's, with the loss on the learned tokens of answers alone.

    TRL takes it on all that follows a prompt: in an answer of several turns also on what tools return and users say.
    """

    def __init__(
        self, collator: Callable[..., dict[str, torch.Tensor]], columns: Mapping[str, Sequence[str]]
    ):
        """columns: mask in TRL's batch -> the rows' columns of learned tokens, which it holds one after another."""
        self._collator, self._columns = collator, columns

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._collator(rows)
        for name, columns in self._columns.items():
            if name in batch:
                learned = (row[column] for column in columns for row in rows)
                for mask, values in zip(batch[name], learned, strict=True):
                    mask[mask.bool()] = torch.tensor(
                        values, dtype=mask.dtype
                    )  # 1 on the answer's tokens so far
        return batch


class RunTrainer(transformers.Trainer):
    """A mixin with what a tuner run changes in a TRL trainer: `class Trainer(RunTrainer, DPOTrainer)`.

    Rows are tokens instead of texts; the optimizer and the schedule are tuner's; nothing is written but checkpoints,
    and nothing is reported to TRL's makers.
    """

    measures: ClassVar[Mapping[str, str]]
    """Name -> TRL's name of a number measured on held-out rows."""
    recorded: ClassVar[Mapping[str, str]]
    """Name -> TRL's name of a number recorded at every step."""
    recorded_at_times: ClassVar[Mapping[str, str]] = {}
    """The same of a number that some steps do not have."""
    reference_columns: ClassVar[tuple[str, ...]]
    """TRL's columns of the reference's log-probabilities, where they are computed before training."""

    def __init__(
        self,
        settings: LoopSettings,
        trained: Mapping[str, torch.nn.Parameter],
        signals: StopSignals,
        **arguments: Any,
    ) -> None:
        """trained: the weights to be trained, by name. arguments: TRL's, without `optimizers`."""
        self.settings, self.signals = settings, signals
        self._trained, self._keep = trained, settings.checkpoint.keep
        model, args = arguments["model"], arguments["args"]
        transformer = unwrapped(model)
        self._original_configs = deepcopy(transformer.config), deepcopy(transformer.generation_config)
        original_weights = {name: weight.data for name, weight in trained.items()}
        optimizer = make_optimizer(settings.optimizer, trained)
        peak = settings.optimizer.lr
        schedule = LambdaLR(
            optimizer, lambda step: learning_rate(settings.schedule, peak, step, args.max_steps) / peak
        )
        args._n_gpu = min(args.n_gpu, 1)  # transformers would split batches over all that it sees
        super().__init__(optimizers=(optimizer, schedule), **arguments)
        for name, weight in trained.items():  # TRL has rounded the adapters of a quantized base to bf16
            weight.data = original_weights[name]
        self.remove_callback(transformers.PrinterCallback)

    def measure(self, rows: Dataset | None) -> dict[str, float]:
        """Means of `measures`, in which every row counts once; empty without rows. All processes call together."""
        return {} if rows is None else self.means(rows, self.measures)

    @without_deprecations()
    def means(self, rows: Dataset, measures: Mapping[str, str]) -> dict[str, float]:
        """Means over the rows of numbers by name -> TRL's name.

        TRL weighs a smaller last batch like a whole one, and counts the rows twice that fill it up over processes.
        So the rows that fill no whole batch are measured one by one, by all processes.
        """
        world = self.args.world_size
        rest = len(rows) % (self.args.per_device_eval_batch_size * world)
        parts: list[Any] = [range(len(rows) - rest)] if len(rows) > rest else []
        parts += [[len(rows) - rest + index] * world for index in range(rest)]
        sums = dict.fromkeys(measures, 0.0)
        for part in parts:
            with self.accelerator.autocast():  # which transformers leaves out where nothing was trained
                # not TRL's evaluate: it would prepare the rows again, and refuses a reference that is not in memory
                means = transformers.Trainer.evaluate(self, rows.select(part))  # pyright: ignore[reportArgumentType]
            for name, key in measures.items():
                sums[name] += means[f"eval_{key}"] * len(set(part))
        return {name: total / len(rows) for name, total in sums.items()}

    @without_deprecations()
    def with_reference(self, rows: Dataset | None) -> Dataset | None:
        """Held-out rows with the reference's log-probabilities, where the config has them computed before training."""
        if rows is None or not cast(Any, self.args).precompute_ref_log_probs:
            return rows
        return self._precompute_ref_logps(rows, "held-out", self.args.per_device_eval_batch_size)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """In memory: TRL writes them to a cache of the machine's, which processes elsewhere do not see."""
        trl = cast(Any, self)
        loader = DataLoader(cast(Any, dataset), batch_size=batch_size, collate_fn=self.data_collator)
        columns: dict[str, list[torch.Tensor]] = {}
        for batch in self.accelerator.prepare(loader):
            logps = trl.compute_ref_log_probs(trl.ref_model or self.model, batch)
            for column, values in zip(self.reference_columns, logps, strict=True):
                if values is not None:
                    gathered = cast(torch.Tensor, self.accelerator.gather_for_metrics(values))
                    columns.setdefault(column, []).append(gathered.cpu())
        for column, parts in columns.items():
            dataset = dataset.add_column(column, torch.cat(parts).tolist())  # pyright: ignore[reportCallIssue]
        return dataset

    @without_deprecations()
    def train_from(self, checkpoint: Path | None, callback: transformers.TrainerCallback) -> None:
        """Train from a checkpoint (None: the start) to the end; the callback decides about the signals heard."""
        if checkpoint is not None and (step_of(checkpoint) >= self.args.max_steps or self.signals.ends):
            # killed between its last step and its end, or to end where it stands
            self._load_from_checkpoint(str(checkpoint))
            return
        self.add_callback(callback)
        with self.signals.listening():
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def restore_model(self) -> None:
        """Undo the changes of TRL and transformers to the model's configurations and adapters."""
        model = cast(Any, self.model)
        transformer = unwrapped(model)
        transformer.config, transformer.generation_config = self._original_configs
        if is_adapted(model) and "ref" in model.peft_config:
            model.delete_adapter("ref")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save and output_dir is not None:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in self._trained.items()}
            with disk_errors(Path(output_dir)):
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                save_file(weights, Path(output_dir, TRAINED))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every rank writes the state of its generators
        if self.args.should_save:
            folder = Path(str(self.args.output_dir))
            seal(folder / f"checkpoint-{self.state.global_step}", CHECKSUMS, {})
            for old in _complete(folder)[: -self._keep]:
                shutil.rmtree(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint, TRAINED))
        if saved.keys() != self._trained.keys():
            raise UserError(
                f"{resume_from_checkpoint}: this checkpoint trains other weights than the config does: "
                "was the model replaced?"
            )
        with torch.no_grad():
            for name, weight in self._trained.items():
                weight.copy_(saved[name])

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # TRL would tokenize texts again, and add tokens that the template has written

    def create_model_card(self, *_: Any, **__: Any) -> None:
        pass

    def _send_telemetry(self) -> None:
        pass


def common_arguments(
    config: TrainingConfig, plan: PairPlan, run: RunFolder, devices: Devices
) -> dict[str, Any]:
    """The arguments that TRL's configs (`DPOConfig` and others) have in common."""
    return {
        "output_dir": str(run.checkpoints_folder),
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.pairs_per_pass,
        "per_device_eval_batch_size": plan.pairs_per_pass,
        "gradient_accumulation_steps": plan.passes_per_step,
        "max_length": None,  # rows are fitted already
        "max_grad_norm": config.max_grad_norm or math.inf,  # 0 would leave the norm unmeasured
        "bf16": devices.products == "bf16",
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "use_cpu": devices.device.type == "cpu",
        "seed": config.seed,
        "save_total_limit": None,  # an old checkpoint goes when the new one is sealed, not before
        "logging_strategy": "no",  # RunCallback decides when to log and to save
        "save_strategy": "no",
        # True would log the mean of the losses before in place of a NaN, and hide it
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": [],
        "dataloader_pin_memory": devices.device.type == "cuda",
        "remove_unused_columns": False,  # the collator needs the learned tokens, which TRL does not know
    }


def padding_token(loaded: Loaded) -> int:
    """The token that TRL pads batches with: the tokenizer's, or its end token."""
    tokenizer: Any = loaded.tokenizer
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def holds_reference(config: Any, loaded: Loaded) -> bool:
    """Whether a second model is held as the reference.

    Not beside an adapter, of which TRL keeps a frozen copy, nor where log-probabilities are computed beforehand.
    """
    return not is_adapted(loaded.model) and not config.precompute_reference


def trained_model_arguments(config: Any, loaded: Loaded, run: RunFolder, devices: Devices) -> dict[str, Any]:
    """The arguments of a RunTrainer that say what is trained: a model, in place, from the reference that it is now."""
    loaded.transformer.set_attn_implementation("sdpa")  # batches are padded here
    model = loaded.model
    return {
        "settings": LoopSettings.of(config),
        "trained": {name: weight for name, weight in model.named_parameters() if weight.requires_grad},
        "signals": StopSignals(lambda: devices.is_main and run.end_requested),
        "model": model,
        # full weights are in fp32, and so is their copy
        "ref_model": deepcopy(model).requires_grad_(False) if holds_reference(config, loaded) else None,
        "processing_class": deepcopy(loaded.tokenizer),  # TRL gives it a padding token
    }


def last_checkpoint(folder: Path, skip_damaged: bool) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint in a folder, and sentences on those set aside; see `newest_sound`.

    Called by the main process, which removes the checkpoints that a kill left incomplete.
    """
    complete = _complete(folder)
    removed = [checkpoint for checkpoint in _checkpoints(folder) if checkpoint not in complete]
    for checkpoint in removed:
        shutil.rmtree(checkpoint)
    checkpoint, _, sentences = newest_sound(complete, _check, skip_damaged)
    return checkpoint, [
        *(f"{path}: was not written to its end, and is removed" for path in removed),
        *sentences,
    ]


def step_of(checkpoint: Path | None) -> int:
    """Steps taken before a checkpoint; 0 for None."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _checkpoints(folder: Path) -> list[Path]:
    paths = (path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted((path for path in paths if path.is_dir()), key=step_of)


def _complete(folder: Path) -> list[Path]:
    """The checkpoints whose last file was written, oldest first."""
    return [checkpoint for checkpoint in _checkpoints(folder) if (checkpoint / CHECKSUMS).is_file()]


def _check(checkpoint: Path) -> None:
    try:
        sealed_values(checkpoint, CHECKSUMS)
    except BrokenSealError as error:
        raise damaged(checkpoint, error) from error
