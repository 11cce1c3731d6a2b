"""Runs of the embedded model, which takes seconds: what cases of correctness train and compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import tuner
from benchmarks.gpu.case import Place
from tuner.config import (
    PPO,
    SFT,
    AdamW,
    Chat,
    Evaluation,
    LoRA,
    Model,
    PolicyEvaluation,
    Preferences,
    Prompts,
    Replay,
    RewardModel,
    Sampling,
    Source,
    StageConfig,
    override,
)
from tuner.stages.run import Run

TINY = "tuner:tiny"
CONDITIONS = ("brief", "detailed", "polite", "blunt", "json", "plain")
SMALL_SFT = SFT(
    name="sft",
    model=Model(path=TINY),
    adapter=LoRA(r=8, alpha=16),
    data=Chat(files=("tuner:sums/train.jsonl",), template="internlm2", max_length=64, limit=200),
    # a large eps: Adam makes a step of every rounding of a zero gradient otherwise
    optimizer=AdamW(lr=5e-3, eps=1e-4),
    tokens_per_step=512,
    tokens_per_pass=512,
    max_steps=4,
    gradient_checkpointing=False,
    evaluation=Evaluation(samples=0),
)
SMALL_REWARD = RewardModel(
    name="reward",
    model=Model(path=TINY),
    adapter=LoRA(r=8, alpha=16),
    conditions={name: f"tuner:twins/{name}.txt" for name in CONDITIONS},
    data=Preferences(
        files=(Source(path="tuner:twins/train.jsonl", limit=40),),
        template="internlm2",
        max_length=256,
    ),
    optimizer=AdamW(lr=5e-3, eps=1e-4),
    tokens_per_step=512,
    tokens_per_pass=512,
    max_steps=4,
    gradient_checkpointing=False,
)
SMALL_PPO = PPO(
    name="ppo",
    policy=Model(path="the SFT run"),
    reward=Model(path="the reward run"),
    prompts=Prompts(
        files=(Source(path="tuner:sums/train.jsonl", condition="brief", limit=30),),
        template="internlm2",
        max_length=48,
    ),
    prompts_per_step=8,
    sampling=Sampling(max_new_tokens=11, top_p=0.95),
    kl=0.1,
    critic_warmup=0,
    critic_lr=5e-3,
    optimizer=AdamW(lr=1e-3, eps=1e-4),
    replay=Replay(
        files=(Source(path="tuner:sums/train.jsonl", limit=60),), template="internlm2", max_length=64
    ),
    tokens_per_pass=256,
    max_steps=2,
    gradient_checkpointing=False,
    evaluation=PolicyEvaluation(samples=0),
)


def train(config: StageConfig, place: Place, folder: str, changes: Mapping[str, Any] | None = None) -> Run:
    """The finished run of a config with some leaves changed, on the place's device, in a folder of its own."""
    device = {"device": place.device.type}
    return tuner.train(override(config, device | dict(changes or {})), runs=place.work / folder)


def starts(place: Place, changes: Mapping[str, Any] | None = None) -> dict[str, str]:
    """A trained policy and a reward model: what PPO's config names."""
    sft = train(SMALL_SFT, place, "starts", changes)
    reward = train(SMALL_REWARD, place, "starts", changes)
    return {"policy.path": str(sft.folder), "reward.path": str(reward.folder)}


def weights(run: Run) -> dict[str, torch.Tensor]:
    """The tensors of a run's model."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(run.model_folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def largest_difference(run: Run, other: Run) -> float:
    """Between two runs' weights; 0 where they are equal bit for bit, NaN counts as different."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    largest = 0.0
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name]):
            largest = max(largest, float((tensor.float() - theirs[name].float()).abs().max()), 1e-30)
    return largest
