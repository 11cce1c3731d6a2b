"""Measurements in a process of their own: nothing measured before adds to their memory or warms their caches."""

import json
import subprocess
import sys
from pathlib import Path

PROCESS = Path("/proc/self")


def in_own_process(script: str, *arguments: object) -> dict[str, float]:
    """What `script --measure ARGUMENTS` prints: one JSON object."""
    command = [sys.executable, script, "--measure", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def reset_peak() -> float:
    """Let this process's peak of resident memory begin anew at what is resident now, which is returned in MB."""
    (PROCESS / "clear_refs").write_text("5", encoding="utf-8")
    return _megabytes("VmRSS")


def peak_megabytes() -> float:
    """Peak of this process's resident memory, since its start or `reset_peak`; unlike getrusage's, not its parent's."""
    return _megabytes("VmHWM")


def _megabytes(field: str) -> float:
    status = (PROCESS / "status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) / 1000
