"""Our own side of comparisons, and vLLM's; `trl_runs.py` has that of the trainers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tuner
from benchmarks.gpu.case import Measurement, NotHereError, Place
from benchmarks.gpu.policy import Generation, random_prompts
from benchmarks.gpu.shapes import SHAPES, model_folder
from benchmarks.gpu.training import WARM_UP, Training
from tuner.config import AdamW, Checkpoint, LoRA, Model, Preferences, RewardModel
from tuner.stages.data_view import load_rows
from tuner.stages.packed_rows import plan

STEPS = 6
PAIR_CHARACTERS = (200, 1_500)
"""Of an answer: the fewest and the most."""


# Not imported at the top: with transformers' Trainer come peft and bitsandbytes, which touches the GPU (child.py).
def trl_qlora(training: Training, place: Place) -> Iterator[Measurement]:
    """Tokens a second of TRL, peft and bitsandbytes on the model and the sizes of our own run."""
    from benchmarks.gpu import trl_runs

    yield from trl_runs.qlora(training, place)


def unsloth_qlora(training: Training, place: Place) -> Iterator[Measurement]:
    """The same by Unsloth."""
    from benchmarks.gpu import trl_runs

    yield from trl_runs.unsloth_qlora(training, place)


def trl_pairs(pairs: Pairs, place: Place) -> Iterator[Measurement]:
    """Pairs a second of TRL's reward model, on the token ids of our own run in the same order."""
    from benchmarks.gpu import trl_runs

    yield from trl_runs.pairs(pairs, place)


def vllm_generation(generation: Generation, place: Place) -> Iterator[Measurement]:
    """Tokens a second of vLLM in this process, with the prompts and the lengths of our own generation."""
    if place.device.type != "cuda":
        raise NotHereError("vLLM is measured on a GPU alone")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    longest = generation.prompt + generation.tokens
    engine = LLM(
        model=str(model_folder(generation.shape, place)),
        dtype="bfloat16",
        max_model_len=longest + 16,
        max_num_seqs=generation.answers,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(generation.answers, generation.prompt)]
    seconds = 0.0
    for tokens in (16, generation.tokens):
        sampling = SamplingParams(
            temperature=1.0, top_p=0.9, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        engine.generate(prompts, sampling)
        seconds = time.perf_counter() - started
    yield Measurement("speed", generation.answers * generation.tokens / seconds, "tokens/s")


@dataclass(frozen=True)
class Pairs:
    """Settings of a reward model's run on pairs whose answers differ in length."""

    shape: str
    batch: int = 16
    """Pairs of TRL's pass."""
    tokens_per_pass: int = 16_384

    def config(self, place: Place) -> RewardModel:
        tokens = place.size(self.tokens_per_pass, 512)
        shape = SHAPES[self.shape]
        return RewardModel(
            name="reward",
            model=Model(path=str(model_folder(self.shape, place))),
            adapter=LoRA(r=place.size(16, 4)),
            data=Preferences(
                files=(str(_write_pairs(place)),), template=shape.template, max_length=tokens // 2
            ),
            reward_token=shape.reward_token,
            optimizer=AdamW(lr=1e-5),
            tokens_per_step=tokens,
            tokens_per_pass=tokens,
            max_steps=place.size(STEPS, WARM_UP + 1),
            gradient_checkpointing=False,
            checkpoint=Checkpoint(every=None),
            device="cuda" if place.device.type == "cuda" else "cpu",
        )


def our_pairs(pairs: Pairs, place: Place) -> Iterator[Measurement]:
    """Pairs a second of a reward model's training."""
    config = pairs.config(place)
    metrics = tuner.train(config, runs=place.work / "runs").metrics
    stream, steps = plan(config, load_rows(config)), range(WARM_UP, len(metrics))
    seconds = sum(metrics[step]["seconds"] for step in steps)
    yield Measurement("speed", sum(len(stream.steps[step].samples) for step in steps) / seconds, "pairs/s")
    yield Measurement("peak", metrics[-1]["memory_gib"], "GiB")


def _write_pairs(place: Place) -> Path:
    """Pairs of answers of random lengths, evenly between the fewest characters and the most."""
    from pydoc_data.topics import topics

    text, generator = " ".join(" ".join(topics.values()).split()), np.random.default_rng(0)
    fewest, most = PAIR_CHARACTERS if not place.is_dry else (5, 40)
    lines = []
    for _ in range(place.size(1_500, 100)):
        starts, sizes = generator.integers(0, len(text) - most, 2), generator.integers(fewest, most, 2)
        better, worse = (text[start : start + size] for start, size in zip(starts, sizes, strict=True))
        lines.append(json.dumps({"prompt": "Go on.", "chosen": f"{better}.", "rejected": f"{worse}!"}))
    file = place.work / "pairs.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
