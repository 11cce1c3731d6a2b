"""Policy runs at real sizes: memory and time of PPO by its six parts, and tokens generated a second."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tuner
from benchmarks.gpu.case import Measurement, NotHereError, Place
from benchmarks.gpu.shapes import SHAPES, model_folder
from benchmarks.gpu.training import predicted_gib, write_text
from tuner.config import (
    PPO,
    AdamW,
    Checkpoint,
    LoRA,
    Model,
    PolicyEvaluation,
    Preferences,
    Prompts,
    Replay,
    RewardModel,
    Sampling,
)
from tuner.models.arithmetic import autocast
from tuner.models.generate import generate, uniforms
from tuner.models.load import load_model, load_tokenizer
from tuner.training.step import Step

PARTS = ("generate", "logprobs", "scores", "rewards", "advantages", "updates")
PROMPT_TOKENS = 960
"""Of a prompt's text, which the small tokenizer may cut otherwise where it begins and ends."""


@dataclass(frozen=True)
class Policy:
    """Settings of a measured PPO run; the answers of a random model are as long as they may be."""

    shape: str
    prompts: int = 32
    """In a step."""
    answer: int = 1024
    """Tokens of an answer."""
    tokens_per_pass: int = 8192
    cache_gib: float = 10.0
    steps: int = 2

    def reward_config(self, place: Place) -> RewardModel:
        """An adapter on the policy's own base, so that all roles share it; trained for a step."""
        shape = SHAPES[self.shape]
        return RewardModel(
            name="reward",
            model=self.model(place),
            adapter=self.adapter(place),
            data=Preferences(files=(str(_write_pairs(place)),), template=shape.template, max_length=128),
            reward_token=shape.reward_token,
            optimizer=AdamW(lr=1e-5, bits=8),
            tokens_per_step=256,
            tokens_per_pass=256,
            max_steps=1,
            device="cuda" if place.device.type == "cuda" else "cpu",
        )

    def config(self, reward: Path, place: Place) -> PPO:
        tokens_per_pass = place.size(self.tokens_per_pass, 128)
        tokenizer = load_tokenizer(self.model(place))
        return PPO(
            name="ppo",
            policy=self.model(place),
            adapter=self.adapter(place),
            reward=Model(path=str(reward)),
            prompts=Prompts(
                files=(str(_write_prompts(place, tokenizer, self.steps * self.prompts)),),
                template=SHAPES[self.shape].template,
                max_length=place.size(1024, 64),
            ),
            prompts_per_step=place.size(self.prompts, 4),
            sampling=Sampling(
                max_new_tokens=place.size(self.answer, 8),
                min_new_tokens=place.size(self.answer, 8) - 1,
                cache_gib=self.cache_gib,
            ),
            optimizer=AdamW(lr=1e-6, bits=8, paged=True),
            critic_warmup=0,
            replay=Replay(
                files=(str(write_text(place, 2 * self.steps * self.prompts, place.size(1024, 64))),),
                max_length=tokens_per_pass,
            ),
            tokens_per_pass=tokens_per_pass,
            max_steps=self.steps,
            checkpoint=Checkpoint(every=None),
            evaluation=PolicyEvaluation(samples=0),
            device="cuda" if place.device.type == "cuda" else "cpu",
        )

    def model(self, place: Place) -> Model:
        return Model(path=str(model_folder(self.shape, place)), quantization="nf4")

    def adapter(self, place: Place) -> LoRA:
        return LoRA(r=place.size(64, 4), alpha=16)


def measure_ppo(policy: Policy, place: Place) -> Iterator[Measurement]:
    """Peak of memory and seconds of each part of the last step; the peak outside generation is what an engine of its
    own would leave."""
    reward = tuner.train(policy.reward_config(place), runs=place.work / "runs")
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = policy.config(reward.folder, place)
    with peaks_by_part(place) as peaks:
        run = tuner.train(config, runs=place.work / "runs")
    outside = max(peak for part, peak in peaks.items() if part != "generate")
    yield Measurement("peak", max(peaks.values()), "GiB", predicted_gib(config))
    yield Measurement("peak_outside_generation", outside, "GiB")
    for part in PARTS:
        yield Measurement(f"peak_{part}", peaks[part], "GiB")
    last = run.metrics[-1]
    for part in PARTS:
        yield Measurement(f"seconds_{part}", last[f"seconds/{part}"], "s")
    yield Measurement("step", last["seconds"], "s", setting=f"{config.prompts_per_step} answers")
    yield Measurement(
        "speed", last["tokens_per_second"], "tokens/s", setting="of a step, prompts and answers"
    )


@contextmanager
def peaks_by_part(place: Place) -> Iterator[dict[str, float]]:
    """While it is open, the largest peak of memory in GiB of each part of a step; on a CPU it is 0."""
    peaks: dict[str, float] = {}
    part = Step.part

    @contextmanager
    def measured_part(self: Step, name: str) -> Iterator[None]:
        on_gpu = place.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(place.device)
        with part(self, name):
            yield
        peak = torch.cuda.max_memory_allocated(place.device) / 2**30 if on_gpu else 0.0
        peaks[name] = max(peak, peaks.get(name, 0.0))

    Step.part = measured_part
    try:
        yield peaks
    finally:
        Step.part = part


@dataclass(frozen=True)
class Generation:
    """Settings of a measured generation: one chunk of answers, none of which ends early."""

    shape: str
    quantization: Any = None
    answers: int = 64
    prompt: int = 512
    tokens: int = 512
    """Of an answer."""


def measure_generation(generation: Generation, place: Place) -> Iterator[Measurement]:
    """Tokens a second of sampled answers with top_p 0.9, prompts' passes included; after a short warm-up."""
    path = str(model_folder(generation.shape, place))
    loaded = load_model(
        Model(path=path, quantization=generation.quantization),
        precision="bf16",
        device=place.device,
        train=False,
    )
    count, tokens = place.size(generation.answers, 2), place.size(generation.tokens, 8)
    prompts = random_prompts(count, place.size(generation.prompt, 12))
    seconds = []
    for length in (min(tokens, 16), tokens):
        place.synchronize()
        started = time.perf_counter()
        with autocast(place.device, "bf16"):
            answers = generate(
                loaded.model,
                prompts,
                max_new_tokens=length,
                temperature=1.0,
                top_p=0.9,
                end_ids=(),
                noise=uniforms(0, 0, range(count), length),
                cache_bytes=64 * 2**30,
            )
        place.synchronize()
        seconds.append(time.perf_counter() - started)
        assert all(len(answer.tokens) == length for answer in answers)
    words = f"{generation.shape}, {count} answers of {tokens} tokens to {len(prompts[0])}"
    yield Measurement("speed", count * tokens / seconds[-1], "tokens/s", setting=words)
    if place.device.type == "cuda":
        yield Measurement("peak", torch.cuda.max_memory_allocated(place.device) / 2**30, "GiB")


def random_prompts(count: int, length: int) -> list[list[int]]:
    """Prompts of ids that every vocabulary here has."""
    return np.random.default_rng(0).integers(10, 1_000, (count, length)).tolist()


def ratio(ours: str, theirs: str, name: str, place: Place) -> Iterator[Measurement]:
    """Our value over a peer's, both of this call and each the best of its settings."""
    for case in (ours, theirs):
        if (case, name) not in place.earlier:
            raise NotHereError(f"{case} has no value in this call")
    yield Measurement("ratio", place.earlier[ours, name] / place.earlier[theirs, name], "×")


def _write_prompts(place: Place, tokenizer: Any, count: int) -> Path:
    """Prompts of as many tokens as a config's `max_length` lets through, less what the chat template adds."""
    size = place.size(PROMPT_TOKENS, 16)
    text = json.loads(write_text(place, 1, count * size).read_text(encoding="utf-8"))["text"]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    rows = [{"prompt": tokenizer.decode(ids[start * size : (start + 1) * size])} for start in range(count)]
    return _write(place.work / "prompts.jsonl", rows)


def _write_pairs(place: Place) -> Path:
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}.", "rejected": f"Not {n}."} for n in range(32)]
    return _write(place.work / "pairs.jsonl", rows)


def _write(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
