"""Several processes on this machine: the same command once per rank, joined by accelerate inside.

`accelerate launch` starts ranks as well (and on several machines), but turns a rank's exit code into 1 and a
user's mistake or a Ctrl-C into a traceback of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from tuner.errors import LOST


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `tuner ARGUMENTS` as `processes` ranks; returns the exit code of the first that failed, or 0.

    SIGINT and SIGTERM are passed on, and the ranks finish their step; when one rank fails the others are ended.
    """
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tuner", *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # a Ctrl-C in the terminal reaches them once, through us
        )
        for rank in range(processes)
    ]

    def pass_on(number: int, _: object) -> None:
        for rank in ranks:
            rank.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    return _first_failure(ranks)


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> int:
    running = list(ranks)
    while running:
        for rank in list(running):
            try:
                code = rank.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            running.remove(rank)
            if code:
                _end(running)
                reasons = [code, *(other.returncode for other in running)]
                code = next((one for one in reasons if one not in (0, LOST)), 1)
                return code if code > 0 else 128 - code
    return 0


def _end(running: list[subprocess.Popen[bytes]], patience: float = 10.0) -> None:
    """End ranks that can only wait for one that is gone; one that is saving may finish first."""
    for rank in running:
        try:
            rank.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            rank.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
