"""What a run asks of the libraries below it."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import torch

import tuner
from tests.equivalence.conftest import SMALL
from tuner.config import override
from tuner.training.devices import Devices

MEMORY_OF_SHAPES = """
import psutil, torch
from tuner.training.devices import Devices

Devices(device="cpu")
weight = torch.randn(256, 128, dtype=torch.bfloat16, requires_grad=True)

def product(rows):
    inputs = torch.randn(rows, 128, dtype=torch.bfloat16, requires_grad=True)
    torch.nn.functional.linear(inputs, weight).sum().backward()
    return psutil.Process().memory_info().rss / 2**20

print(product(40), max(map(product, range(41, 191))))
"""


def test_kernels_compiled_for_past_shapes_are_let_go():
    """A packed pass has a length of its own. With the libraries' own limits, in the environment, this fails."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_SHAPES], capture_output=True, text=True, check=True
    )
    before, after = map(float, done.stdout.split())
    assert after < before + 150


def test_a_runs_peak_of_memory_is_not_that_of_what_ran_before(tmp_path):
    devices = Devices(device="cpu")
    before = devices.memory_gib()
    np.ones(2**27)  # 1 GiB
    assert devices.memory_gib() > before + 0.8
    run = tuner.train(override(SMALL, {"max_steps": 1}), runs=tmp_path)
    assert run.metrics[-1]["memory_gib"] < before + 0.5


def test_a_gpus_peak_is_reset_by_its_allocator(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    gpu = torch.device("cuda", 1)
    Devices.reset_peak_memory(SimpleNamespace(device=gpu))
    assert reset == [gpu]
