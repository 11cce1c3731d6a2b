"""The Python of another tool, which may have an environment of its own, and the variables it is started with."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tuner.errors import UserError
from tuner.models.cuda_allocator import is_ours

PYTHON = "TUNER_HANDOVER_PYTHON"
"""Environment variable with the Python of the environment that has tools for finished models."""
DEFAULT_PYTHON = ".venv-handover/bin/python"

_LAUNCH_VARIABLES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
}
_LAUNCH_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
"""What torchrun, `accelerate launch` and `tuner` tell a rank of the run it belongs to."""


def tool_environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a program that is no rank of this run: without what a launcher told this process, and what
    tuner asks of torch's allocator.

    A program that uses torch.distributed itself would take itself for a rank. A vLLM server under torchrun waited for
    a store that nobody opens (TORCHELASTIC_USE_AGENT_STORE), and died after minutes.
    """
    return {
        name: value
        for name, value in variables.items()
        if name not in _LAUNCH_VARIABLES
        and not name.startswith(_LAUNCH_PREFIXES)
        and not is_ours(name, value)
    }


def python_with(package: str, module: str, what: str) -> str:
    """A Python that has a package: this one, or that of $TUNER_HANDOVER_PYTHON or DEFAULT_PYTHON.

    what: the option that needs it. Raises UserError where neither has it.
    """
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    other = Path(os.environ.get(PYTHON) or DEFAULT_PYTHON).expanduser().absolute()
    if os.access(other, os.X_OK):
        looks = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        if subprocess.run([str(other), "-c", looks], env=tool_environment(), check=False).returncode == 0:
            return str(other)
    raise UserError(
        f"{what} needs {package}: `pip install {package}` here, or in an environment of its own whose python "
        f"${PYTHON} names; `make handover` makes that in tuner's repository"
    )


def run_tool(command: list[str], what: str, stdin: str | None = None) -> str:
    """Run a tool's program; returns what it printed to stdout. stdin: a text for it to read.

    Raises UserError with its last words where it fails.
    """
    finished = subprocess.run(
        command,
        input=stdin,
        env=tool_environment(),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if finished.returncode:
        words = [line for line in finished.stderr.splitlines() if line.strip()] or ["no message"]
        raise UserError(f"{what}: {Path(command[0]).name} failed ({words[-1].strip()[:300]})")
    return finished.stdout
