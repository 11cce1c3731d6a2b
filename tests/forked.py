"""A child of the test's process: it ends by itself, by a signal, or with a traceback and code 1."""

import os
import sys
import traceback
from collections.abc import Callable

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


def exit_code(child: int) -> int:
    """What a child exited with, once it has; the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
