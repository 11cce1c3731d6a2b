"""torchrun starts all ranks again when one was killed, and they go on from the last checkpoint, bit for bit."""

from pathlib import Path

import torch

from tests.equivalence.conftest import curve, run_as_rank, weights
from tests.forked import exit_code, fork
from tuner.config import to_json
from tuner.stages.run import Run

KILLED_ONCE = """
import os, signal, sys, tuner
from pathlib import Path
from tuner.config import from_json
from tuner.training.step import Step

folder = Path(sys.argv[1])
config = from_json((folder / "small.json").read_text())
tuner.train(config, runs=folder / "whole")
backward = Step.backward

def killed(self):
    backward(self)
    if self.index == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

Step.backward = killed
tuner.train(config, runs=folder / "killed")
"""


def rank(folder: Path) -> None:
    """What torchrun starts twice in each of two places."""
    run_as_rank(folder, [], {})


def torchrun(folder: Path) -> None:
    """In a child, whose ranks are its own children: the command itself would import everything four times."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    place = {
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "127.0.0.1:0",
        "run_id": "restart",
        "start_method": "fork",
    }
    elastic_launch(LaunchConfig(1, 1, 2, max_restarts=1, **place), rank)(folder)


def test_a_rank_is_killed_and_torchrun_starts_all_again(small, tmp_path):
    config = small({"adapter.dropout": 0.1, "checkpoint.every": 2, "tokens_per_pass": 128})
    (tmp_path / "small.json").write_text(to_json(config))
    (tmp_path / "two.py").write_text(KILLED_ONCE)
    code = exit_code(fork(lambda: torchrun(tmp_path)))
    assert code == 0, (tmp_path / "rank0.log").read_text()[-3000:]
    whole, killed = (Run(tmp_path / name / "small") for name in ("whole", "killed"))
    assert "going on after step 2 of 5" in (killed.folder / "log.txt").read_text()
    assert curve(killed) == curve(whole)
    assert killed.results == whole.results
    assert all(torch.equal(tensor, weights(killed)[name]) for name, tensor in weights(whole).items())
