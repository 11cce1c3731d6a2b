"""Runs that must follow the same trajectory: how a step is split changes memory and speed, never the result."""

import json

import pytest
import torch

from tests.equivalence.conftest import by_accelerate, curve, in_processes, weights

FULL = {"adapter": None, "optimizer.lr": 1e-3}
NF4 = {"model.quantization": "nf4"}
INT8 = {"model.quantization": "int8"}


def assert_close(one, other):
    """The first step to rounding; later ones as far as Adam carries a rounding on (a fault is off by percents)."""
    for own, their in zip(curve(one), curve(other), strict=True):
        assert own[:2] == their[:2]
        first = own[0] == 1
        assert own[2] == pytest.approx(their[2], rel=1e-6 if first else 1e-4)
        assert own[3] == pytest.approx(their[3], rel=2e-6 if first else 2e-3)
    for name, tensor in weights(one).items():
        assert (tensor - weights(other)[name]).norm() <= 2e-3 * tensor.norm()


@pytest.mark.parametrize("kind", [{}, FULL, NF4], ids=["lora", "full", "qlora"])
def test_any_pass_size(small, train, kind):
    whole = train(small(kind), "whole")
    assert {record["passes"] for record in whole.metrics} == {1}
    parts = train(small(kind | {"tokens_per_pass": 64}), "parts")
    assert min(record["passes"] for record in parts.metrics) >= 8
    assert_close(whole, parts)


@pytest.mark.parametrize("kind", [{}, FULL, NF4], ids=["lora", "full", "qlora"])
def test_checkpointing_on_or_off_bit_for_bit(small, train, kind):
    ways = (False, True, "selective", "offload")
    off, *on = (curve(train(small(kind | {"gradient_checkpointing": way}), str(way))) for way in ways)
    assert on == [off] * 3


def test_twice_is_the_same_bit_for_bit(small, train):
    config = small({"adapter.dropout": 0.1})
    one, two = train(config, "one"), train(config, "two")
    assert curve(one) == curve(two)
    assert all(torch.equal(tensor, weights(two)[name]) for name, tensor in weights(one).items())


def test_another_seed_is_another_run(small, train):
    assert curve(train(small(), "one")) != curve(train(small({"seed": 1}), "two"))


def test_two_processes_equal_one(small, train, tmp_path):
    """Three runs in one launch by accelerate: plain, QLoRA, and one with a rank that has no pass."""
    cases = {
        "plain": small({"tokens_per_pass": 128}),
        "qlora": small(NF4 | {"tokens_per_pass": 128}),
        "idle": small({"tokens_per_step": 64, "tokens_per_pass": 64}),
    }
    by_accelerate(tmp_path, cases)
    from tuner.stages.run import Run

    for name, config in cases.items():
        one, two = train(config, f"one/{name}"), Run(tmp_path / "two" / name / "small")
        assert two.read_json("versions")["processes"] == 2
        assert_close(one, two)


STEPS_WITHOUT_A_GRADIENT = """
import json, sys, torch
from pathlib import Path
from tuner.config import AdamW, Constant, Checkpoint, HeldOutEvaluation
from tuner.training.devices import Devices
from tuner.training.loop_settings import LoopSettings
from tuner.training.optimizers import Trained
from tuner.training.updater import Updater
devices = Devices(device="cpu", precision="fp32")
weights = {name: torch.nn.Parameter(torch.ones(1, 2)) for name in ("all_ranks", "one_rank", "no_rank")}
settings = LoopSettings(
    AdamW(lr=0.1, weight_decay=0.5), Constant(warmup=0), Checkpoint(), HeldOutEvaluation(), max_grad_norm=1.0
)
updater = Updater({"all": Trained(weights, 0.1)}, settings, 2, devices)
for step, names in enumerate((("all_ranks", "one_rank", "no_rank"), ("all_ranks", "one_rank"))):
    for name in names:
        if name == "all_ranks" or devices.is_main:
            share = devices.world if name == "all_ranks" else 1
            (weights[name].sum() / share).backward()
    norms = updater.apply(step, {}).grad_norms
if devices.is_main:
    result = {name: weight.tolist() for name, weight in weights.items()} | dict(norms)
    Path(sys.argv[1], f"{devices.world}.json").write_text(json.dumps(result))
"""
"""Two updates: in the second, one of three weights has a gradient on no rank, and one on the main rank alone."""


def test_a_weight_without_gradient_is_left_alone_in_any_number_of_processes(tmp_path):
    for count in (1, 2):
        in_processes(count, tmp_path, {}, STEPS_WITHOUT_A_GRADIENT)
    one, two = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2))
    assert one == two
    assert one["no_rank"] != one["one_rank"] == one["all_ranks"]
