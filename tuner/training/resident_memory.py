"""Peak of this process's resident memory, which may begin anew: a process may train one run after another."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

_PROCESS = Path("/proc/self")


def reset_peak_resident() -> None:
    """Let the peak begin anew at what is resident now; without effect but on Linux, or where a container forbids it."""
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5", encoding="utf-8")


def peak_resident_kib() -> int:
    """The peak since `reset_peak_resident`, else since the start, in KiB.

    Not getrusage's where Linux has its own, which alone is reset: getrusage's may be the parent's.
    """
    with suppress(OSError):
        status = (_PROCESS / "status").read_text(encoding="utf-8")
        if "VmHWM:" in status:
            return int(status.partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
