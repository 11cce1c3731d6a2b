"""Runs that must follow the same trajectory: how a step is split changes memory and speed, never the result."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.equivalence.conftest import curve, weights
from tuner.config import to_json

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
    off, on = (train(small(kind | {"gradient_checkpointing": flag}), str(flag)) for flag in (False, True))
    assert curve(off) == curve(on)


def test_twice_is_the_same_bit_for_bit(small, train):
    config = small({"adapter.dropout": 0.1})
    one, two = train(config, "one"), train(config, "two")
    assert curve(one) == curve(two)
    assert all(torch.equal(tensor, weights(two)[name]) for name, tensor in weights(one).items())


def test_another_seed_is_another_run(small, train):
    assert curve(train(small(), "one")) != curve(train(small({"seed": 1}), "two"))


def test_two_processes_equal_one(small, train, tmp_path):
    """Three runs in one launch, for the imports' sake: plain, QLoRA, and one with a rank that has no pass."""
    cases = {
        "plain": small({"tokens_per_pass": 128}),
        "qlora": small(NF4 | {"tokens_per_pass": 128}),
        "idle": small({"tokens_per_step": 64, "tokens_per_pass": 64}),
    }
    for name, config in cases.items():
        (tmp_path / f"{name}.json").write_text(to_json(config))
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, tuner\n"
        "from pathlib import Path\n"
        "from tuner.config import from_json\n"
        "for name in sys.argv[2:]:\n"
        "    config = from_json(Path(sys.argv[1], f'{name}.json').read_text())\n"
        "    tuner.train(config, runs=Path(sys.argv[1], 'two', name))\n"
    )
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    plain = ["--mixed_precision=no", "--dynamo_backend=no"]
    done = subprocess.run(
        [sys.executable, *launch, *plain, str(script), str(tmp_path), *cases],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    from tuner.training.run import Run

    for name, config in cases.items():
        one, two = train(config, f"one/{name}"), Run(tmp_path / "two" / name / "small")
        assert two.kept("versions")["processes"] == 2
        assert_close(one, two)
