"""A Python interpreter for blocks that a model writes: another process with limits, in an empty folder.

Off unless the user asks for it. The process is Python's isolated mode with an empty environment, no input, limits on
processor time, wall time, memory, the size of a file and open files; the standard library starts no other processes
for it and opens no connections. Where the system has namespaces for users (`unshare`), it has no network and sees no
other process. It is no jail: it can read and delete the files that the user can, and fill the disk with many files.
Where that matters, run the evaluation in a container.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

_LIMITED = """
import resource, sys
import _posixsubprocess, ctypes
REFUSED = ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen",
           "pty.spawn", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "os.kill", "os.killpg",
           "ctypes.dlopen", "ctypes.dlsym", "ctypes.dlsym/handle")
def refuse(event, arguments):
    if event in REFUSED or event == "import" and arguments[0] == "_posixsubprocess":
        raise PermissionError(event + ": a block starts no processes and opens no connections")
def fork_exec(*arguments):
    refuse("subprocess.Popen", arguments)
# no event tells of it; subprocess and multiprocessing take it from this module. ctypes is imported before it may open
# no libraries, as numpy and sympy import it
_posixsubprocess.fork_exec = fork_exec
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
# a second later: at the hard limit the signal is SIGKILL, which says nothing of the reason
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
for name, limit in (("AS", memory), ("FSIZE", 2**20), ("NOFILE", 64), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
sys.argv = [""]
code = sys.stdin.read()
# not a limit on processes: root has none
sys.addaudithook(refuse)
exec(compile(code, "<block>", "exec"), {"__name__": "__main__"})
"""
_NAMESPACES = (
    "unshare",
    "--user",
    "--map-root-user",
    "--net",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)


@dataclass(frozen=True)
class Interpreter:
    """Runs blocks, each in a process of its own: no block sees what an earlier one has defined."""

    seconds: int = 5
    """Processor time and wall time of a block."""
    memory: int = 512 * 2**20
    """Bytes of address space."""
    characters: int = 2_000
    """Most of the output that is given back; its end, where errors stand."""

    def run(self, code: str) -> str:
        """What a block prints, with the error that ended it, as InternLM2's interpreter answers."""
        folder = tempfile.mkdtemp(prefix="tuner-block-")
        try:
            # without a name: the folder and all in it are the block's
            with tempfile.TemporaryFile() as stream:
                ending = self._run(code, folder, stream.fileno())
                stream.seek(0)
                # all that was written: a file ends at its limit
                text = stream.read().decode(errors="replace").strip()
        finally:
            _remove(folder)
        return "\n".join(filter(None, [text[-self.characters :], ending]))

    def _run(self, code: str, folder: str, stream: int) -> str:
        """Run a block in a folder, its output into an open file; a sentence where it did not end by itself."""
        command = [*_without_network(), sys.executable, "-I", "-u", "-c", _LIMITED]
        process = subprocess.Popen(
            [*command, str(self.seconds), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            cwd=folder,
            # nothing of the user's: no tokens, no paths of code
            env={"PATH": os.defpath, "HOME": folder, "LANG": "C.UTF-8"},
            # a group of its own, so that whatever the block starts ends with it
            start_new_session=True,
        )
        try:
            process.communicate(code.encode(errors="replace"), timeout=self.seconds + 1)
        except subprocess.TimeoutExpired:
            return f"TimeoutError: the block ran for more than {self.seconds} seconds"
        finally:
            _end_group(process)
        if process.returncode == -signal.SIGXCPU or process.returncode == 128 + signal.SIGXCPU:
            return f"TimeoutError: the block ran for more than {self.seconds} seconds"
        return ""


def has_network() -> bool:
    """Whether blocks can reach the network, since this system has no namespaces for users."""
    return not _without_network()


@functools.cache
def _without_network() -> Sequence[str]:
    """The command that runs another without a network; empty where the system does not allow it."""
    if shutil.which(_NAMESPACES[0]) is None:
        return ()
    probe = subprocess.run([*_NAMESPACES, "true"], capture_output=True, check=False)
    return _NAMESPACES if probe.returncode == 0 else ()


def _remove(folder: str) -> None:
    """Remove what a block has left, without an error: it may have removed its folder, or nested folders too deep."""
    with suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        subprocess.run(["rm", "-rf", folder], capture_output=True, check=False)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
