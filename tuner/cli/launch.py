"""Several processes on this machine: the same command once per rank, joined by accelerate inside.

`accelerate launch` starts ranks as well (and on several machines), but turns a rank's exit code into 1 and a
user's mistake or a Ctrl-C into a traceback of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from tempfile import TemporaryFile

from tuner.errors import LOST

PATIENCE = 3.0
"""Seconds a rank has to say why it failed, after another did, before it is ended."""


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `tuner ARGUMENTS` as `processes` ranks; returns the exit code of the first that failed, or 0.

    SIGINT, SIGTERM and SIGHUP are passed on, and the ranks finish their step; when one rank fails the others are
    ended. What rank 0 says is shown as it comes; what another says, when it fails for a reason of its own.
    """
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with ExitStack() as files:
        said = [None, *(files.enter_context(TemporaryFile("w+")) for _ in range(1, processes))]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tuner", *arguments],
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=said[rank],
                start_new_session=True,  # a Ctrl-C in the terminal reaches them once, through us
                preexec_fn=_end_with_parent,
            )
            for rank in range(processes)
        ]

        def pass_on(number: int, _: object) -> None:
            for rank in ranks:
                rank.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, pass_on)
        failed = _first_failure(ranks)
        if failed is None:
            return 0
        if (own := said[failed]) is not None:
            own.seek(0)
            sys.stderr.write(own.read())
        code = ranks[failed].returncode
        return code if code > 0 else 128 - code


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """The rank that failed for a reason of its own; None when all succeeded."""
    codes = [rank.poll() for rank in ranks]
    while None in codes and not any(codes):
        time.sleep(0.05)
        codes = [rank.poll() for rank in ranks]
    failed = [number for number, code in enumerate(codes) if code]
    if not failed:
        return None
    running = [number for number, code in enumerate(codes) if code is None]
    _end([ranks[number] for number in running], ranks[failed[0]].returncode)
    failed += [number for number in running if ranks[number].returncode > 0]  # below 0: by our own hand
    with_reason = [number for number in failed if ranks[number].returncode != LOST]
    return min(with_reason, default=failed[0])  # rank 0 has been heard already


def _end(running: list[subprocess.Popen[bytes]], code: int) -> None:
    """Wait for ranks that were interrupted as well; end those that can only wait for one that is gone."""
    if code not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        deadline = time.monotonic() + PATIENCE
        while any(rank.poll() is None for rank in running) and time.monotonic() < deadline:
            time.sleep(0.05)
        for rank in running:
            if rank.poll() is None:
                rank.kill()
    for rank in running:
        rank.wait()


def _end_with_parent() -> None:
    """A rank whose launcher is killed is told to stop: nobody else would (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
