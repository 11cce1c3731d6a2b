"""Two processes on one card against one: by gloo, as NCCL refuses two ranks on a device.

A rank is this module as a program: python -m benchmarks.gpu.two_processes FOLDER.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

import tuner
from benchmarks.gpu.case import Measurement, Place
from benchmarks.gpu.child import fork
from benchmarks.gpu.rows import ROOT
from benchmarks.gpu.small_runs import SMALL_SFT, train
from tuner.config import from_json, override, to_json

LAYOUTS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {"plain": {}, "shard": {"parallel.shard": 2}, "sequence": {"parallel.sequence": 2}}
)
CHANGES = {"precision": "fp32", "tokens_per_pass": 128}


def measure(layout: str, place: Place) -> Iterator[Measurement]:
    """Relative difference of the losses of two processes and of one, in fp32, the largest of the steps."""
    # before this process touches the device, which its children could not use then
    config = override(SMALL_SFT, {**CHANGES, **LAYOUTS[layout], "device": place.device.type})
    (place.work / "config.json").write_text(to_json(config), encoding="utf-8")
    _run_ranks(place)
    single = train(override(SMALL_SFT, CHANGES), place, "one")
    both = tuner.open_run(place.work / "two" / str(config.name))
    losses = [[record["loss"] for record in run.metrics] for run in (single, both)]
    difference = max(abs(one - two) / abs(one) for one, two in zip(*losses, strict=True))
    yield Measurement("loss_difference", difference, "")


def _run_ranks(place: Place) -> None:
    """Raises RuntimeError with the last line of what a rank says, where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {}
    for rank in range(2):
        # both have the local rank 0: the first card
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        log = place.work / f"rank{rank}.txt"
        # in the group of the case: where that is stopped, they are
        ranks[fork(partial(_start_rank, place, variables), log, own_group=False)] = log
    try:
        while ranks:
            child, code = os.waitpid(-1, os.WNOHANG)
            if not child:
                time.sleep(0.1)
                continue
            log = ranks.pop(child)
            if os.waitstatus_to_exitcode(code):
                said = log.read_text(encoding="utf-8").strip()
                print(said)
                raise RuntimeError(f"{log.stem}: {said.splitlines()[-1] if said else 'ended'}")
    finally:
        for child in ranks:  # the other waits for one that has failed
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _start_rank(place: Place, variables: Mapping[str, str]) -> None:
    os.environ |= variables
    if place.device.type == "cpu":
        run_rank(place.work)
        return
    os.environ["PYTHONPATH"] = str(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.two_processes", str(place.work)])


def run_rank(folder: Path) -> None:
    """Train the folder's config as one of the ranks that the environment names."""
    config = from_json((folder / "config.json").read_text(encoding="utf-8"))
    # accelerate would choose NCCL on a GPU; it takes a group that is there
    torch.distributed.init_process_group("gloo")
    tuner.train(config, runs=folder / "two")


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
