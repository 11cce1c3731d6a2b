"""A child of the test's process: it ends by itself, by a signal, or with a traceback and code 1."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def fork(work: Callable[[], object]) -> int:
    """The id of a child process that does some work and exits with 0, or prints why it could not and exits with 1."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        # torch's thread pool does not survive a fork. The first call that asks for it makes another, without a lock:
        # two of transformers' loading threads at once, and one of them gets none ("Invalid thread pool!").
        torch.set_num_threads(torch.get_num_threads())
        work()
        code = 0
    except BaseException:
        # a traceback that pytest's capture shows: nothing else tells what ended the child before its time
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def tuner_command(folder: Path, *arguments: str) -> int:
    """The id of a child that is `tuner` with these arguments in a folder, where `said.txt` has what it says.

    It is a process as a shell's, with its own signals and exit code, but for seconds of imports.
    """

    def work() -> None:
        from tuner.cli.main import main

        os.chdir(folder)
        sys.stdout = sys.stderr = Path("said.txt").open("w", buffering=1)  # noqa: SIM115
        for descriptor in (1, 2):
            os.dup2(sys.stdout.fileno(), descriptor)
        sys.argv = ["tuner", *arguments]
        try:
            main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    return fork(work)


def is_running(child: int) -> bool:
    """Whether a child has not ended; it is still to be asked for its exit code."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def exit_code(child: int) -> int:
    """What a child exited with, once it has; the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
