"""A case in a process of its own: what it measures reaches the runner, also where it crashes, hangs or fills the card.

The runner imports everything once, never touches the GPU, and forks: an import costs each case ten seconds otherwise.
Where CUDA does not work in a fork (something that was imported has touched it), a case is an interpreter of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.case import Case, Measurement, NotHereError, Place

PATIENCE = 0.1
"""Seconds between two looks at a running case."""
LONGEST_LINE = 300
"""Characters kept of an error's line."""


@dataclass(frozen=True)
class Ended:
    """What became of a case."""

    outcome: str
    """ "measured", "not installed" or "failed"."""
    why: str = ""


def fork(work: Callable[[], object], log: Path, *, own_group: bool = True) -> int:
    """The id of a child that does some work and ends; it prints into `log`.

    own_group: in a process group of its own, which is ended with all that it has started.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        if own_group:
            os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        # Its thread pool does not survive a fork, and is made anew by the first call that asks for it.
        torch.set_num_threads(torch.get_num_threads())
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def measure_into(spool: Path, case: Case, place: Place) -> None:
    """In a child: write each value of a case into a file as soon as it is there, and at last how the case ended."""
    _set_up(place)
    with spool.open("a", encoding="utf-8") as file:

        def say(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        try:
            for measured in case.measure(place):
                say(asdict(measured))
            say({"outcome": "measured", "why": ""})
        except NotHereError as missing:
            say({"outcome": "not installed", "why": str(missing)})
        except BaseException as error:  # whatever it is, it is the case's, and the others go on
            traceback.print_exc()
            say({"outcome": "failed", "why": one_line(error)})


def _set_up(place: Place) -> None:
    """Let what a case leaves behind go with its folder, and let its runs draw no curves, which no value needs."""
    from tuner.stages import run

    os.environ["TUNER_CACHE"] = str(place.work / "cache")
    os.chdir(place.work)
    run.draw_curves = lambda metrics, path, *_: path.touch()


def one_line(error: BaseException) -> str:
    """Kind and first words of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_LINE]


def follow(child: int, spool: Path, seconds: float, add: Callable[[Measurement], None]) -> Ended:
    """Hand on what a child measures until it ends, or is ended after so many seconds with all that it has started."""
    deadline, ended, lines = time.monotonic() + seconds, None, _Lines(spool)
    status: int | None = None
    while status is None:
        pid, code = os.waitpid(child, os.WNOHANG)
        if pid:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() > deadline:
            end_group(child)
            os.waitpid(child, 0)
            ended = Ended("failed", f"stopped after {seconds:.0f} s, its limit")
            status = -signal.SIGKILL
        else:
            time.sleep(PATIENCE)
        for line in lines.new():
            if "outcome" in line:
                ended = Ended(**line)
            else:
                add(Measurement(**line))
    end_group(child)  # servers and further ranks that it has left behind
    return ended or Ended("failed", f"its process ended by {_manner(status)}")


def end_group(child: int) -> None:
    """End a child and whatever is in its process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def works_in_a_fork(device: torch.device, log: Path, seconds: float = 120) -> bool:
    """Whether a child of this process can use the device."""
    child = fork(lambda: torch.zeros(1, device=device).item(), log)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, code = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(code) == 0
        time.sleep(PATIENCE)
    end_group(child)
    os.waitpid(child, 0)
    return False


def _manner(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"


class _Lines:
    """A file that another process writes, line by line."""

    def __init__(self, file: Path) -> None:
        self._file, self._read = file, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Whole lines that have been written since the last call."""
        if not self._file.is_file():
            return
        with self._file.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            yield json.loads(line)
