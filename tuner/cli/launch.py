"""Launch several processes on this machine: the same command once per rank.

`accelerate launch` starts ranks as well (and on several machines), but replaces a rank's exit code by 1, and prints
a traceback of its own after a user error or a Ctrl-C.
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
from tuner.printable import echo
from tuner.training.stop_signals import STOPPING, heeded

FAILURE_GRACE_SECONDS = 3.0
"""How long other ranks may take to report their own error after one has failed, before they are killed."""


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `tuner ARGUMENTS` as `processes` ranks; returns the exit code of the rank that failed first, or 0.

    SIGINT, SIGTERM and SIGHUP are forwarded, and the ranks finish their step. When one rank fails the others are
    ended. Rank 0's stderr is shown as it comes; another rank's only if it failed for a reason of its own.
    """
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
    }
    # torch's default is all cores in each process, which slows every rank down.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with ExitStack() as files:
        # Files, not pipes: a rank that fills a pipe nobody reads blocks, and all ranks with it.
        stderr_files = [None, *(files.enter_context(TemporaryFile("w+")) for _ in range(1, processes))]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tuner", *arguments],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=stderr_files[rank],
                start_new_session=True,  # so that Ctrl-C reaches ranks only once, through us
                preexec_fn=_terminate_with_parent,
            )
            for rank in range(processes)
        ]

        def forward(number: int, _: object) -> None:
            for rank in ranks:
                rank.send_signal(number)

        for number in heeded():
            signal.signal(number, forward)
        failed = _first_failure(ranks)
        if failed is None:
            return 0
        if (stderr_file := stderr_files[failed]) is not None:
            stderr_file.seek(0)
            sys.stderr.write(stderr_file.read())
        code = ranks[failed].returncode
        if code > 0:
            return code
        # A child killed by signal N has the code -N; a shell reports it as 128 + N.
        echo(f"tuner: {_death(failed, -code)}", sys.stderr)
        return 128 - code


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """Number of the rank whose own error ended the launch; None when all succeeded."""
    codes = [rank.poll() for rank in ranks]
    while None in codes and not any(codes):
        time.sleep(0.05)
        codes = [rank.poll() for rank in ranks]
    failed = [number for number, code in enumerate(codes) if code]
    if not failed:
        return None
    running = [number for number, code in enumerate(codes) if code is None]
    _end_ranks([ranks[number] for number in running], ranks[failed[0]].returncode)
    # The others fail because of it, often sooner than it is seen: whatever they say, it is the reason.
    if killed := [number for number in failed if codes[number] is not None and ranks[number].returncode < 0]:
        return killed[0]
    failed += [number for number in running if ranks[number].returncode > 0]  # below 0: killed by us
    with_own_error = [number for number in failed if ranks[number].returncode != LOST]
    return min(with_own_error, default=failed[0])  # rank 0 first: its error is shown already


def _death(rank: int, number: int) -> str:
    name = signal.Signals(number).name
    memory = ", which is what the system does when memory runs out" if number == signal.SIGKILL else ""
    return f"rank {rank} was killed by {name}{memory}; run the same command again to go on from the last checkpoint"


def _end_ranks(running: list[subprocess.Popen[bytes]], code: int) -> None:
    """Wait for ranks that were interrupted too; kill those that would wait forever for the failed one."""
    if code not in [128 + number for number in STOPPING]:
        deadline = time.monotonic() + FAILURE_GRACE_SECONDS
        while any(rank.poll() is None for rank in running) and time.monotonic() < deadline:
            time.sleep(0.05)
        for rank in running:
            if rank.poll() is None:
                rank.kill()
    for rank in running:
        rank.wait()


def _terminate_with_parent() -> None:
    """In a rank: get SIGTERM if the launcher is killed, which cannot forward it then (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
