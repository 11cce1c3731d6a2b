"""Real tools that finished models are handed over to: `make test-handover` runs these tests, `make test` does not."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tuner.models.tool_python import DEFAULT_PYTHON, PYTHON


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.handover)


@pytest.fixture(scope="session")
def tools_python() -> str:
    """The environment that make makes; without it these tests fail: skipped, they would show nothing."""
    os.environ.setdefault(PYTHON, str(ROOT / DEFAULT_PYTHON))
    return os.environ[PYTHON]


Ask = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def ask_llama_cpp(tools_python: str) -> Ask:
    """Takes questions about GGUF files to llama.cpp; see ask_llama_cpp.py."""

    def ask(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        program = Path(__file__).with_name("ask_llama_cpp.py")
        finished = subprocess.run(
            [tools_python, str(program)],
            input=json.dumps(questions),
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr[-4000:]
        return json.loads(finished.stdout)

    return ask
