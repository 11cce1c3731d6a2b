"""100 kills at random times over all stages: each run goes on as if nothing had happened."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tuner
from tests.forked import exit_code, fork
from tests.soak.conftest import STAGES
from tuner.config import StageConfig
from tuner.stages.run import Run

pytestmark = pytest.mark.soak
KILLS = 15
"""Of each of the seven stages."""
SPENT = ("seconds", "tokens_per_second", "memory_gib")
CHANGES: dict[str, Any] = {"max_steps": 8, "checkpoint.every": 2, "checkpoint.keep": 2}


def outcome(run: Run) -> dict[str, Any]:
    """All that a run leaves, without times."""
    tensors = {
        str(file.relative_to(run.folder)): load_file(file)
        for place in ("model", "checkpoints")
        for file in (run.folder / place).rglob("*.safetensors")
    }
    records = [
        {name: value for name, value in record.items() if name.split("/")[0] not in SPENT}
        for record in run.metrics
    ]
    files = [run.folder / name for name in ("results.json", "rollouts.jsonl", "samples.jsonl")]
    texts = {file.name: file.read_text() for file in files if file.is_file()}
    return {"records": records, "texts": texts, "tensors": tensors}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["records"] == other["records"]
    assert one["texts"] == other["texts"]
    assert one["tensors"].keys() == other["tensors"].keys()
    for file, tensors in one["tensors"].items():
        assert tensors.keys() == other["tensors"][file].keys()
        assert all(torch.equal(tensor, other["tensors"][file][name]) for name, tensor in tensors.items()), (
            file
        )


def train_until_killed(config: StageConfig, runs: Path, seconds: float) -> bool:
    """Whether a process that trains was killed after so many seconds, before its end."""
    child = fork(lambda: tuner.train(config, runs=runs))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    code = exit_code(child)
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random(stage, stage_config, tmp_path):
    config = stage_config(stage, CHANGES)
    tuner.train(config, runs=tmp_path / "warm")  # imports and caches
    begin = time.monotonic()
    whole = outcome(tuner.train(config, runs=tmp_path / "whole"))
    seconds = time.monotonic() - begin
    chance = random.Random(os.environ.get("SOAK_SEED", "0"))
    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / f"killed_{runs}"
        if train_until_killed(config, folder, chance.uniform(0, seconds)):
            kills += 1
        else:
            runs += 1
            assert_same(whole, outcome(Run(folder / str(config.name))))
    assert_same(whole, outcome(tuner.train(config, runs=tmp_path / f"killed_{runs}")))
    print(f"{stage}: {kills} kills, {runs + 1} runs, no difference")
