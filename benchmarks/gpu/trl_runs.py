"""TRL's trainers, alone and under Unsloth, each at its best of some settings."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from benchmarks.gpu.case import Measurement, Place
from benchmarks.gpu.peers import STEPS, Pairs
from benchmarks.gpu.shapes import model_folder
from benchmarks.gpu.training import WARM_UP, Training
from tuner.data.stream import Stream
from tuner.stages.data_view import load_rows
from tuner.stages.packed_rows import plan


@dataclass(frozen=True)
class Setting:
    """How a peer trains."""

    batch: int
    checkpointing: bool
    liger: bool = False

    def __str__(self) -> str:
        recomputed = "recomputed" if self.checkpointing else "kept"
        return f"batch of {self.batch}, activations {recomputed}{', Liger' if self.liger else ''}"


TRL_SETTINGS = (
    Setting(2, checkpointing=False, liger=True),
    Setting(2, checkpointing=False),
    Setting(2, checkpointing=True, liger=True),
    Setting(2, checkpointing=True),
)
UNSLOTH_SETTINGS = (Setting(2, checkpointing=False), Setting(2, checkpointing=True))


def qlora(training: Training, place: Place) -> Iterator[Measurement]:
    """Tokens a second of TRL, peft and bitsandbytes on the model and the samples of our own run."""

    def trained(setting: Setting) -> Iterator[Measurement]:
        folder = str(model_folder(training.shape, place))
        double = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        has_flash = importlib.util.find_spec("flash_attn_2_cuda") is not None
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=double,
            dtype=torch.bfloat16,
            attn_implementation="flash_attention_2" if has_flash else "sdpa",
            device_map={"": place.device},
        )
        return _train_by_trl(model, _lora(place, training), setting, training, place)

    has_liger = importlib.util.find_spec("liger_kernel") is not None
    settings = [setting for setting in TRL_SETTINGS if has_liger or not setting.liger]
    yield from _each(settings, trained, place)


def unsloth_qlora(training: Training, place: Place) -> Iterator[Measurement]:
    """The same by Unsloth."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    def trained(setting: Setting) -> Iterator[Measurement]:
        model, _ = FastLanguageModel.from_pretrained(
            str(model_folder(training.shape, place)),
            max_seq_length=training.sample,
            dtype=torch.bfloat16,
            load_in_4bit=True,
        )
        lora = _lora(place, training)
        model = FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            use_gradient_checkpointing="unsloth" if setting.checkpointing else False,
            random_state=0,
        )
        return _train_by_trl(model, None, setting, training, place)

    yield from _each(UNSLOTH_SETTINGS, trained, place)


def _each(
    settings: Sequence[Setting], trained: Callable[[Setting], Iterator[Measurement]], place: Place
) -> Iterator[Measurement]:
    """Those settings that fit the card's memory; raises the last error where none does."""
    failed: list[BaseException] = []
    for setting in settings[: place.size(len(settings), 1)]:
        try:
            yield from trained(setting)
        except torch.OutOfMemoryError as error:
            print(f"{setting}: {error}")
            failed.append(error.with_traceback(None))  # which would hold the model in memory
        gc.collect()  # trainers are in cycles
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(place.device)
    if len(failed) == len(settings):
        raise failed[-1]


def _lora(place: Place, training: Training) -> Any:

    assert training.r is not None
    return LoraConfig(
        r=place.size(training.r, 4), lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _train_by_trl(
    model: Any, peft_config: Any, setting: Setting, training: Training, place: Place
) -> Iterator[Measurement]:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    sample, steps, clock = place.size(training.sample, 32), place.size(STEPS, WARM_UP + 1), Clock(place)
    rows = np.random.default_rng(0).integers(10, 1_000, ((steps + 1) * setting.batch, sample)).tolist()
    on_gpu = place.device.type == "cuda"
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(place.work / "trl"),
            max_steps=steps,
            max_length=sample,
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=1,
            gradient_checkpointing=setting.checkpointing and peft_config is not None,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_liger_kernel=setting.liger,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch",
            learning_rate=1e-5,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            report_to=[],
            save_strategy="no",
            logging_steps=steps,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=AutoTokenizer.from_pretrained(str(model_folder(training.shape, place))),
        peft_config=peft_config,
        callbacks=[clock],
    )
    trainer.train()
    speed = setting.batch * sample / statistics.median(clock.seconds[WARM_UP:])
    yield Measurement("speed", speed, "tokens/s", setting=str(setting))
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(place.device) / 2**30
        yield Measurement("peak", peak, "GiB", setting=str(setting))


class Clock(TrainerCallback):
    """The seconds of each step of a transformers trainer, until the device has done it."""

    def __init__(self, place: Place) -> None:
        self.seconds: list[float] = []
        self._place, self._begun = place, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._place.synchronize()
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._place.synchronize()
        self.seconds.append(time.perf_counter() - self._begun)


def pairs(settings: Pairs, place: Place) -> Iterator[Measurement]:
    """The same by TRL, on the same token ids in the same order."""
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    config, clock = settings.config(place), Clock(place)
    stream = plan(config, load_rows(config))
    order = [int(sample) for step in stream.steps for sample in step.samples]
    batch, steps, on_gpu = (
        place.size(settings.batch, 2),
        place.size(STEPS, WARM_UP + 1),
        place.device.type == "cuda",
    )
    assert config.adapter is not None
    lora = LoraConfig(
        task_type="SEQ_CLS", r=config.adapter.r, target_modules="all-linear", modules_to_save=["score"]
    )
    trainer = RewardTrainer(
        model=config.model.path,
        args=RewardConfig(
            output_dir=str(place.work / "trl"),
            max_steps=steps,
            max_length=config.data.max_length,
            per_device_train_batch_size=batch,
            learning_rate=1e-5,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([_pair_tokens(stream, sample) for sample in order[: batch * steps]]),
        processing_class=AutoTokenizer.from_pretrained(config.model.path),
        peft_config=lora,
        callbacks=[clock],
    )
    trainer.train()
    yield Measurement("speed", batch * (steps - WARM_UP) / sum(clock.seconds[WARM_UP:]), "pairs/s")


def _pair_tokens(stream: Stream, sample: int) -> dict[str, list[int]]:
    """A pair as a row of TRL's dataset."""
    batch = stream.batch([sample])
    parts = torch.split(batch.tokens_T, torch.diff(batch.offsets).tolist())
    assert batch.pairs is not None
    better, worse = int(batch.pairs.better_P), int(batch.pairs.worse_P)
    return {"chosen_ids": parts[better].tolist(), "rejected_ids": parts[worse].tolist()}
