"""Measurements in a process of their own: nothing measured before adds to their memory or warms their caches."""

import json
import subprocess
import sys

from tuner.training.resident_memory import peak_resident_kib, reset_peak_resident


def in_own_process(script: str, *arguments: object) -> dict[str, float]:
    """What `script --measure ARGUMENTS` prints: one JSON object."""
    command = [sys.executable, script, "--measure", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def reset_peak() -> float:
    """Let this process's peak of resident memory begin anew at what is resident now, which is returned in MB."""
    reset_peak_resident()
    return peak_megabytes()


def peak_megabytes() -> float:
    """Peak of this process's resident memory, since its start or `reset_peak`."""
    return peak_resident_kib() / 1000
