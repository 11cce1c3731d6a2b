"""What a first run on a GPU goes through: every stage, precision and optimizer, generation, resume, several processes.

    python -m pytest -m gpu tests/gpu -rP                                on a GPU
    TUNER_TEST_DEVICE=cpu python -m pytest -m gpu tests/gpu -rP          the same on a CPU, where it takes minutes

On a GPU, runs are compared with the same run on the CPU. None of it has run on a GPU yet. What can be emulated is in
test_emulated.py, which needs none.
"""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import tuner
from tests.equivalence.conftest import SMALL, SMALL_PPO, SMALL_REWARD, by_accelerate, weights
from tests.equivalence.test_resume import Killed, kill_at
from tuner.config import SFT, StageConfig, override
from tuner.data.conversation import Turn
from tuner.models.chat import open_chat
from tuner.models.varlen import has_kernels, varlen_attention
from tuner.stages.run import Run

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("TUNER_TEST_DEVICE") or "cuda"
BF16 = {"precision": "bf16", "max_steps": 6}
EIGHT_BITS = {"optimizer.bits": 8, "adapter.r": 256, "adapter.alpha": 512}
"""bitsandbytes holds in 8 bit what has 4,096 numbers, and pages what has 100,000: at a small rank, hardly any of this
model's adapters."""
SFT_KINDS: dict[str, dict[str, Any]] = {
    "lora, fp32": {"precision": "fp32"},
    "lora, bf16": {},
    "lora, bf16, checkpointed": {"gradient_checkpointing": True},
    "all weights, bf16": {"adapter": None, "optimizer.lr": 1e-3},
    "nf4": {"model.quantization": "nf4"},
    "int8": {"model.quantization": "int8"},
    "8-bit optimizer": EIGHT_BITS,
    "paged 8-bit optimizer": EIGHT_BITS | {"optimizer.paged": True, "model.quantization": "nf4"},
}
TOLERANCES = {"int8": 0.1, "lora, fp32": 1e-4}
"""Relative, of the losses of six steps against the CPU's; the others compute in bf16, whose spacing is 2⁻⁸."""


def train(config: StageConfig, folder: Path, device: str = DEVICE) -> Run:
    run = tuner.train(override(config, {"device": device}), runs=folder / device)
    assert all(math.isfinite(record["loss"] or math.nan) for record in run.metrics)
    return run


def train_on_both(config: StageConfig, folder: Path, tolerance: float) -> Run:
    """The run on the device, whose losses are those of the CPU."""
    run = train(config, folder)
    if DEVICE != "cpu":
        expected = [record["loss"] for record in train(config, folder, "cpu").metrics]
        assert [record["loss"] for record in run.metrics] == pytest.approx(expected, rel=tolerance)
    return run


@pytest.mark.parametrize("kind", SFT_KINDS)
def test_sft(kind, tmp_path):
    config = override(SMALL, BF16 | SFT_KINDS[kind])
    run = train_on_both(config, tmp_path, TOLERANCES.get(kind, 3e-2))
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    chat = open_chat(str(run.folder), device=torch.device(DEVICE), template="internlm2")
    assert "".join(chat.answer([Turn("user", "What is 2 + 3?")], max_new_tokens=8))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_reward_model(quantization, tmp_path):
    config = override(SMALL_REWARD, BF16 | {"model.quantization": quantization})
    train_on_both(config, tmp_path, 3e-2)


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("starts")
    sft = train(override(SMALL, BF16 | {"max_steps": 30, "optimizer.lr": 1e-2}), folder)
    reward = train(override(SMALL_REWARD, BF16), folder)
    return {"policy.path": str(sft.folder), "reward.path": str(reward.folder)}


@pytest.mark.parametrize("roles", ["shared", "separate"])
def test_every_role_of_ppo(roles, starts, tmp_path):
    """Near-ties of a sample fall otherwise than on a CPU, so answers differ. What holds of a first step does not."""
    run = train(override(SMALL_PPO, starts | BF16 | {"roles": roles, "critic_warmup": 0}), tmp_path)
    first = run.metrics[0]
    assert first["ratio"] == pytest.approx(1.0, abs=0.02)
    assert first["kl"] == pytest.approx(0.0, abs=0.02)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    changes = {"deterministic": True, "checkpoint.every": 2, "adapter.dropout": 0.1, "device": DEVICE}
    config = override(SMALL, BF16 | changes)
    whole = tuner.train(config, runs=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 3, before_finish=True)
        with pytest.raises(Killed):
            tuner.train(config, runs=tmp_path / "killed")
    resumed = tuner.train(config, runs=tmp_path / "killed")
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_two_processes_equal_one(tmp_path):
    """On GPUs: NCCL's sums of gradients, objects gathered, weights in shards, rows together. Needs two of them."""
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config: SFT = override(SMALL, {"tokens_per_pass": 128, "device": DEVICE})
    layouts = {"plain": {}, "shards": {"parallel.shard": 2}, "rows": {"parallel.sequence": 2}}
    by_accelerate(tmp_path, {name: override(config, layout) for name, layout in layouts.items()})
    losses = [record["loss"] for record in train(config, tmp_path).metrics]
    for name in layouts:
        two = Run(tmp_path / "two" / name / str(config.name))
        assert losses == pytest.approx([record["loss"] for record in two.metrics], rel=1e-4)


@pytest.mark.parametrize("window", [None, 7])
def test_attention_kernels_equal_the_exact_path(window):
    device = torch.device(DEVICE)
    if DEVICE == "cuda":
        assert has_kernels(torch.device("cuda", 0)), (
            "below compute capability 8.0 attention is exact, and slow"
        )
    torch.manual_seed(0)
    borders = (0, 5, 22, 150)
    shapes = [(1, heads, borders[-1], 64) for heads in (8, 2, 2)]
    packed = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    segments: dict[str, Any] = {
        "segment_borders": torch.tensor(borders),
        "cu_seq_lens_q": torch.tensor(borders, device=device, dtype=torch.int32),
        "max_length_q": 128,
        "sliding_window": window,
    }
    fast, _ = varlen_attention(torch.nn.Module(), packed[0], packed[1], packed[2], None, **segments)
    gradients = torch.autograd.grad(fast.float().square().sum(), packed)
    exact = [tensor.detach().float().requires_grad_() for tensor in packed]  # fp32: one call for each segment
    slow, _ = varlen_attention(torch.nn.Module(), exact[0], exact[1], exact[2], None, **segments)
    expected = torch.autograd.grad(slow.square().sum(), exact)
    assert (fast.float() - slow).norm() < 1e-2 * slow.norm()
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient.float() - other).norm() < 2e-2 * other.norm()
