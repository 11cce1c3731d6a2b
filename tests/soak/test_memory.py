"""Over 200 steps in bf16, the memory of no stage grows."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.soak.conftest import STAGES
from tuner.config import to_json

pytestmark = pytest.mark.soak
STEPS, SETTLED = 200, 60
"""Steps of a run, and those in which allocators and caches fill: a leak of a pass's activations or of a step's answers
goes on afterwards."""
TRAIN = """
import json, sys, tempfile
import psutil
import tuner
from tuner.config import from_json
from tuner.training.watchers import Watchers

class Memory:
    def __init__(self): self.bytes = []
    def step(self, record): self.bytes.append(psutil.Process().memory_info().rss)
    def __getattr__(self, name): return lambda *arguments: None

memory = Memory()
tuner.train(from_json(sys.stdin.read()), runs=tempfile.mkdtemp(), watchers=[memory])
print(json.dumps(memory.bytes))
"""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_memory_is_flat(stage, stage_config):
    config = stage_config(stage, {"precision": "bf16", "max_steps": STEPS, "checkpoint.every": 50})
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        input=to_json(config),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    mib = [size / 2**20 for size in json.loads(done.stdout.splitlines()[-1])]
    assert len(mib) == STEPS
    print(f"{stage}: {mib[0]:.0f} MiB after the first step, {max(mib[:SETTLED]):.0f} within {SETTLED}, "
          f"{max(mib[SETTLED:]):.0f} at most later")  # fmt: skip
    # with ONEDNN_PRIMITIVE_CACHE_CAPACITY and LRU_CACHE_CAPACITY at the libraries' 1,024, PPO's does not hold
    assert max(mib[SETTLED:]) < max(mib[:SETTLED]) + 64
