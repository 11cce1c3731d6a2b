"""The TRL door: its DPOTrainer, given tokens of ours, with a run folder's metrics, checkpoints and signals.

A checkpoint is TRL's own, a folder `checkpoint-120`, but for the trained weights, which are one safetensors file by
the model's names. Optimiser, schedule and generators are pickles by torch.save, read with `weights_only`; a folder
that a kill left unfinished, which has no readable trainer_state.json, is removed.
Going on is as good as transformers': weights, optimiser, order of the pairs and generators are as they were.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR

from tuner.config import DPO
from tuner.data.load_pairs import Pair
from tuner.errors import UserError
from tuner.models.adapters import is_adapted
from tuner.models.load import Loaded
from tuner.models.locate import first_line
from tuner.models.quantization import bitsandbytes
from tuner.models.save import disk_errors
from tuner.models.unwrap import unwrapped
from tuner.training.devices import Devices
from tuner.training.loop import Interrupted
from tuner.training.optimizers import make_optimizer
from tuner.training.pair_plan import PairPlan
from tuner.training.run_folder import Run
from tuner.training.schedules import learning_rate
from tuner.training.watchers import Watchers

bitsandbytes()  # transformers' Trainer imports it, with the advice this door leaves out

from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

MEASURES = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
"""What is measured on held-out pairs, and TRL's names for it."""
RECORDED = MEASURES | {"chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected"}
_TRAINED = "trained.safetensors"

Measured = dict[str, float]
"""Of held-out pairs, by the names of MEASURES; empty where there are none."""


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """TRL and transformers use names that transformers 5.23 deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def make_dataset(pairs: Iterable[Pair]) -> Dataset:
    """Pairs as TRL wants them."""
    columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for pair in pairs:
        for name, tokens in pair.items():
            columns[name].append(tokens)
    return Dataset.from_dict(columns)


class Trainer(DPOTrainer):
    """TRL's, on tokens instead of texts, which neither writes model cards nor reports to its makers."""

    def __init__(self, trained: Mapping[str, torch.nn.Parameter], **arguments: Any) -> None:
        self._trained = trained
        transformer = unwrapped(arguments["model"])
        self._given = deepcopy(transformer.config), deepcopy(transformer.generation_config)
        start = {name: weight.data for name, weight in trained.items()}
        super().__init__(**arguments)
        for name, weight in trained.items():  # TRL has rounded the adapters of a quantised base to bf16
            weight.data = start[name]
        self.remove_callback(PrinterCallback)

    @_without_deprecations()
    def measure(self, pairs: Dataset | None) -> Measured:
        """Mean `loss`, `accuracy` and `margin`, every pair counting once; empty without pairs.

        TRL counts a smaller last batch as a whole one, and twice what fills it up over processes. So here what is
        left of whole batches is asked about one by one, by all processes.
        """
        if pairs is None:
            return {}
        world = self.args.world_size
        rest = len(pairs) % (self.args.per_device_eval_batch_size * world)
        parts: list[Any] = [range(len(pairs) - rest)] if len(pairs) > rest else []
        parts += [[len(pairs) - rest + index] * world for index in range(rest)]
        sums = dict.fromkeys(MEASURES, 0.0)
        for part in parts:
            with self.accelerator.autocast():  # which transformers leaves out where nothing was trained
                found = self.evaluate(pairs.select(part))
            for name, key in MEASURES.items():
                sums[name] += found[f"eval_{key}"] * len(set(part))
        return {name: total / len(pairs) for name, total in sums.items()}

    @_without_deprecations()
    def go_on(self, checkpoint: Path | None, follower: Follower) -> None:
        """Train from a checkpoint (None: the start) to the end. Raises Interrupted when a signal asked for it."""
        if checkpoint is not None and step_of(checkpoint) >= self.args.max_steps:
            self._load_from_checkpoint(str(checkpoint))  # killed between its last step and its end
            return
        self.add_callback(follower)
        with follower.listening():
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def give_back(self) -> None:
        """Undo what TRL and transformers have changed of the model beside its weights."""
        transformer = unwrapped(self.model)
        transformer.config, transformer.generation_config = self._given
        if is_adapted(self.model) and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save and output_dir is not None:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in self._trained.items()}
            with disk_errors(Path(output_dir)):
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                save_file(weights, Path(output_dir, _TRAINED))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint, _TRAINED))
        if saved.keys() != self._trained.keys():
            raise UserError(
                f"{resume_from_checkpoint}: this checkpoint trains other weights than the config does: "
                "was the model replaced?"
            )
        with torch.no_grad():
            for name, weight in self._trained.items():
                weight.copy_(saved[name])

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # TRL would tokenise texts again, and add tokens that the template has written

    def create_model_card(self, *_: Any, **__: Any) -> None:
        pass

    def _send_telemetry(self) -> None:
        pass


@_without_deprecations()
def make_trainer(config: DPO, loaded: Loaded, pairs: Dataset, run: Run, devices: Devices) -> Trainer:
    """TRL's trainer over the model's trained weights, with our optimiser and schedule. Raises UserError where TRL
    refuses.

    An adapter is compared with a frozen copy of itself, full weights with a copy of the model, in fp32 as they are.
    """
    plan = PairPlan(config, len(pairs), devices.world)
    loaded.transformer.set_attn_implementation("sdpa")  # batches are padded here
    trained = {name: weight for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    optimizer = make_optimizer(config.optimizer, trained)
    peak = config.optimizer.lr
    schedule = LambdaLR(optimizer, lambda step: learning_rate(config.schedule, peak, step, plan.steps) / peak)
    try:
        return Trainer(
            trained,
            model=loaded.model,
            ref_model=None if is_adapted(loaded.model) else deepcopy(loaded.model).requires_grad_(False),
            args=_settings(plan, run, devices),
            train_dataset=pairs,
            processing_class=deepcopy(loaded.tokenizer),  # TRL gives it a padding token
            optimizers=(optimizer, schedule),
        )
    except ValueError as error:  # such as an adapter on the head
        raise UserError(f"{config.name}: TRL's DPO cannot train this ({first_line(error)})") from error


def _settings(plan: PairPlan, run: Run, devices: Devices) -> DPOConfig:
    config = plan.config
    settings = DPOConfig(
        output_dir=str(run.checkpoints_folder),
        max_steps=plan.steps,
        per_device_train_batch_size=config.pairs_per_pass,
        per_device_eval_batch_size=config.pairs_per_pass,
        gradient_accumulation_steps=plan.passes_per_step,
        max_length=None,  # rows are fitted already
        beta=config.beta,
        loss_type=[config.loss],
        label_smoothing=config.label_smoothing,
        max_grad_norm=config.max_grad_norm or math.inf,  # 0 would leave the norm unmeasured
        bf16=config.precision == "bf16",
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        use_cpu=devices.device.type == "cpu",
        seed=config.seed,
        save_total_limit=config.checkpoint.keep,
        logging_strategy="no",  # when to log and to save is the callback's to say
        save_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=devices.device.type == "cuda",
    )
    settings._n_gpu = min(settings.n_gpu, 1)  # transformers would split batches over all that it sees
    return settings


class Follower(TrainerCallback):
    """Follows TRL's loop: one record per optimiser step, checkpoints when they are due, an end when asked for.

    at_start: is called before the first step of a new run. (A model that transformers evaluates before `train` is
    taken for prepared, and its ranks are trained apart.) validate: measures the validation rows; empty without them.
    """

    def __init__(
        self,
        config: DPO,
        run: Run,
        devices: Devices,
        watchers: Watchers,
        at_start: Callable[[], Any],
        validate: Callable[[], Measured],
    ) -> None:
        self._config, self._run, self._devices, self._watchers = config, run, devices, watchers
        self._at_start, self._validate = at_start, validate
        self._tokens_before = int((run.metrics or [{"tokens": 0}])[-1]["tokens"])
        self._tokens = self._tokens_before
        self._asked: int | None = None
        self._stopping: int | None = None
        """The signal all ranks have agreed to stop for."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests to finish the step, save and raise Interrupted; only the main thread
        can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, self._ask_to_stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_train_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == 0:
            self._at_start()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        asked = self._devices.gather([self._asked])
        self._stopping = max(filter(None, asked), default=None)
        control.should_log = True
        control.should_save = bool(self._stopping) or _due(self._config.checkpoint.every, state)
        control.should_training_stop |= bool(self._stopping)

    def on_log(self, _: Any, state: TrainerState, __: Any, logs: Mapping[str, float], **___: Any) -> None:
        if "loss" not in logs:  # of an evaluation, or of the whole
            return
        record = self._record(state, logs)
        finite = None not in record.values()
        if finite and _due(self._config.evaluation.every or max(1, state.max_steps // 10), state):
            record |= {f"eval_{name}": value for name, value in self._validate().items()}
        if self._devices.is_main:
            self._run.record(record)
            self._watchers.step(record)
        if not finite:
            raise UserError(
                f"{self._run.folder}: loss or gradient was not finite in step {state.global_step}, and TRL skips no "
                "step; lower optimizer.lr, or look at the rows"
            )

    def on_train_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if self._stopping and state.global_step < state.max_steps:
            raise Interrupted(self._stopping, state.global_step)

    def _record(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, Any]:
        seconds = time.perf_counter() - self._started
        before, self._tokens = self._tokens, self._tokens_before + int(logs["num_tokens"])
        lr = learning_rate(
            self._config.schedule, self._config.optimizer.lr, state.global_step - 1, state.max_steps
        )
        record = {
            "step": state.global_step,
            "tokens": self._tokens,
            **{name: logs[key] for name, key in RECORDED.items()},
            "lr": lr,
            "grad_norm": logs["grad_norm"],
            "epoch": state.epoch,
            "seconds": seconds,
            "tokens_per_second": (self._tokens - before) / seconds,
            "memory_gib": self._devices.memory_gib(),
        }
        return {name: value if math.isfinite(value) else None for name, value in record.items()}

    def _ask_to_stop(self, number: int, _: FrameType | None) -> None:
        if self._asked == signal.SIGINT == number:
            raise KeyboardInterrupt  # a second Ctrl-C will not wait
        self._asked = number


def last_checkpoint(folder: Path, is_main: bool) -> Path | None:
    """The newest complete checkpoint in a folder; the main process removes what others a kill has left."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of)
    for one in found:
        if is_main and not _is_complete(one):
            shutil.rmtree(one)
    return next(filter(_is_complete, reversed(found)), None)


def step_of(checkpoint: Path | None) -> int:
    """The steps taken before it; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _due(every: int | None, state: TrainerState) -> bool:
    return state.global_step == state.max_steps or (every is not None and state.global_step % every == 0)


def _is_complete(checkpoint: Path) -> bool:
    """Whether its last file was written."""
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
