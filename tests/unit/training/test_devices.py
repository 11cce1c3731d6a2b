"""What a run asks of the libraries below it."""

import subprocess
import sys

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
