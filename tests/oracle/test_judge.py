"""A judge on a real server of a real model: `transformers serve` with SmolLM2-135M-Instruct.

Skipped with the reason where the weights, or the packages that transformers serves with, are not installed.
"""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.oracle.test_smollm2 import kept, smollm2
from tests.unit.feedback.conftest import candidates, row
from tuner.config.feedback_config import Judge
from tuner.feedback.judge import JudgeLabeler
from tuner.feedback.store import LabelStore
from tuner.rollout.vllm_server import usable_port

__all__ = ["kept", "smollm2"]  # fixtures

MISSING = [name for name in ("fastapi", "openai") if find_spec(name) is None]
pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(
        bool(MISSING), reason=f"transformers serves with {', '.join(MISSING)}: pip install them"
    ),
]
SERVE = "from transformers.cli.transformers import main; main()"
LONGEST = 16
"""Tokens of a reply."""


@pytest.fixture
def url(smollm2: Path) -> Iterator[str]:
    port = usable_port()
    options = ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen([sys.executable, "-c", SERVE, "serve", str(smollm2), *options])
    address = f"http://localhost:{port}/v1"
    while not answers(f"http://localhost:{port}/health"):
        assert process.poll() is None
        time.sleep(0.2)
    yield address
    process.kill()
    process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            return response.status == 200
    except (urllib.error.URLError, TimeoutError):
        return False


@pytest.mark.timeout(1800)
def test_a_real_model_is_asked_about_both_orders_and_nothing_twice(
    url: str, smollm2: Path, tmp_path: Path
) -> None:
    """What it says is not its part: of so small a model, most replies have no verdict."""
    answers = [{"text": "2 + 3 is 5."}, {"text": "I like trains."}]
    pairs = candidates(row(1, prompt="What is 2 + 3?", answers=answers))
    store = LabelStore(tmp_path / "labels.sqlite")
    judge = JudgeLabeler(Judge(url=url, model=str(smollm2), max_tokens=LONGEST, timeout=600.0))
    first, again = judge.label(pairs, store).figures, judge.label(pairs, store).figures
    (label,) = store.labels()
    store.close()
    assert label.annotator == f"judge:{smollm2}"
    assert first["refused"] == 0
    replies = first["replies"]
    assert replies in (2, 3, 4), "a reply without a verdict is asked for it once more"
    assert first["prompt_tokens"] > 200 * replies, "counted by the server, with the task"
    assert replies <= first["completion_tokens"] <= LONGEST * replies
    assert (again["new_replies"], again["replies"]) == (0, replies)
