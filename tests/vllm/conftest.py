"""A real vLLM server: `make test-vllm` runs these tests, `make test` does not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tuner.rollout.vllm_client import KEY
from tuner.rollout.vllm_server import DEFAULT_PYTHON, PYTHON

PATIENCE = 600.0
"""Seconds to wait for what a server that starts makes possible."""
RULE = "def short(answer, row):\n    return 1 / (1 + len(answer))\n"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.vllm)
            # a server takes a minute to start on two idle cores, and each test starts a few
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    """vLLM's environment, made by make; without it these tests fail: skipped, they would show nothing."""
    os.environ.setdefault(PYTHON, str(ROOT / DEFAULT_PYTHON))
    os.environ.pop(KEY, None)
    os.environ.pop("PYTHONPATH", None)


class Command:
    """A `tuner` command in a process of its own, its output kept."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.lines: list[str] = []
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tuner", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> re.Match[str]:
        """The first line that matches; AssertionError, with all output, where none comes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if match := re.search(pattern, "".join(self.lines)):
                return match
            assert not ended, "".join(self.lines)
            time.sleep(0.1)
        raise AssertionError("".join(self.lines))

    def end(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start a `tuner` command in this test's folder; it ends with the test."""
    commands: list[Command] = []

    def started(*arguments: str) -> Command:
        commands.append(Command(tmp_path, *arguments))
        return commands[-1]

    yield started
    for one in commands:
        one.end()


def children(parent: int) -> list[int]:
    """Process numbers of a process's children."""
    place = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(number) for number in place.read_text().split()] if place.exists() else []


def until(condition: Callable[[], Any], *commands: Command) -> None:
    """Wait for a condition; AssertionError, with the output of commands that should bring it about, if it fails."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        alive = all(command.process.poll() is None for command in commands)
        assert alive, ["".join(command.lines) for command in commands]
        assert time.monotonic() < deadline, ["".join(command.lines) for command in commands]
        time.sleep(0.05)
