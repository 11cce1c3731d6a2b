"""Runs of the command line on a real vLLM server: killed and resumed, with adapters, full weights and four bits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tuner
from tests.equivalence.conftest import SMALL_PPO
from tests.vllm.conftest import PATIENCE, RULE, Command, children, until
from tuner.config import PPO, Model, override, to_json
from tuner.rollout.vllm_server import usable_port
from tuner.stages.run import Run

UNSTEADY = ("seconds", "tokens_per_second", "memory_gib")
FP32_GAP = 1e-4
"""Nats per token; both compute in fp32."""


@pytest.fixture
def write(tmp_path) -> Callable[..., str]:
    """Write a small config, some leaves changed, as a file for the command line; returns its name."""

    def written(changes: dict[str, Any]) -> str:
        (tmp_path / "rules.py").write_text(RULE)
        config = small(tmp_path, changes)
        (tmp_path / "small.py").write_text(
            f"from tuner.config import from_json\n\nconfig = from_json({to_json(config)!r})\n"
        )
        return "small.py"

    return written


def small(folder: Path, changes: dict[str, Any]) -> PPO:
    base = SMALL_PPO.model_copy(update={"policy": Model(path="tuner:tiny")})
    rule = {"reward": f"{folder / 'rules.py'}:short", "critic_from": "policy", "replay": None}
    steps = {"adapter": {"r": 8}, "max_steps": 4, "checkpoint.every": 100, "critic_warmup": 0}
    return override(base, {**rule, **steps, "engine": {"url": None}, "name": "small", **changes})


def steady(run: Run) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if not name.startswith(UNSTEADY)}
        for record in run.metrics
    ]


def servers_of(command: Command) -> list[int]:
    return children(command.process.pid)


def test_a_killed_run_goes_on_from_its_stored_rollouts(write, command, tmp_path):
    """SIGKILL at once, in the middle of a step: the server ends, too, and each step's answers are those of before."""
    run, first = Run(tmp_path / "runs" / "small"), command("train", write({}))
    until(lambda: (run.folder / "answers" / "step_000002.safetensors").exists(), first)
    (server,) = servers_of(first)
    first.end(signal.SIGKILL)
    until(lambda: not Path(f"/proc/{server}").exists())
    stored = {path.name: path.read_bytes() for path in (run.folder / "answers").iterdir()}
    before = steady(run)
    assert len(before) >= 2
    second = command("train", "small.py")
    assert second.process.wait(PATIENCE) == 0, second.lines
    assert steady(run)[: len(before)] == before
    assert len(run.metrics) == 4
    after = {path.name: path.read_bytes() for path in (run.folder / "answers").iterdir()}
    assert all(after[name] == content for name, content in stored.items() if name in after)
    assert all(record["generator_gap_max"] < FP32_GAP for record in run.metrics)
    assert not (run.folder / "served_base").exists()


def test_full_weights_reach_a_server_that_is_started_again(tmp_path):
    """At a temperature of its own: the log-probabilities are then those after it."""
    (tmp_path / "rules.py").write_text(RULE)
    sampling = {"sampling.top_p": 1.0, "sampling.temperature": 0.7}
    full = {"adapter": None, "roles": "separate", "max_steps": 2, "optimizer.lr": 1e-3, **sampling}
    run = tuner.train(small(tmp_path, full), runs=tmp_path)
    assert run.metrics[1]["kl"] > 0.01, "the second rollout is of other weights than the first"
    assert all(record["generator_gap_max"] < FP32_GAP for record in run.metrics)


def test_a_policy_of_four_bits(tmp_path):
    (tmp_path / "rules.py").write_text(RULE)
    changes = {"policy": {"path": "tuner:tiny", "quantization": "nf4"}, "max_steps": 2}
    run = tuner.train(small(tmp_path, changes), runs=tmp_path)
    assert all(record["generator_gap_max"] < FP32_GAP for record in run.metrics)


def test_runs_share_a_server_that_is_killed_and_started_by_hand(write, command, tmp_path):
    """`tuner serve-rollouts`, twice on the same port: the run waits meanwhile, and loads its adapter again."""
    port = usable_port()
    options = ("--port", str(port), "--precision", "fp32", "--max-lora-rank", "8", "--max-length", "128")
    first = command("serve-rollouts", "tuner:tiny", *options)
    url = first.wait_for(r'engine=VLLM\(url="(.*)"\)')[1]
    run = Run(tmp_path / "runs" / "small")
    train = command("train", write({"engine": {"url": url, "retries": 20}, "epochs": 3.0, "max_steps": 12}))
    until(lambda: (run.folder / "answers" / "step_000003.safetensors").exists(), train)
    (server,) = servers_of(first)
    os.killpg(server, signal.SIGKILL)
    assert first.process.wait(60) == 2
    assert "the vLLM server ended by itself" in "".join(first.lines)
    train.wait_for("waiting for the vLLM server")
    second = command("serve-rollouts", "tuner:tiny", *options)
    second.wait_for("is served")
    assert train.process.wait(PATIENCE) == 0, train.lines
    assert len(run.metrics) == 12
    assert all(record["generator_gap_max"] < FP32_GAP for record in run.metrics)
    assert second.end(signal.SIGINT) == 0
    assert not list(Path(os.environ["TUNER_CACHE"]).glob("*.key"))


def test_a_server_that_cannot_start_is_explained(tmp_path):
    (tmp_path / "rules.py").write_text(RULE)
    config = small(tmp_path, {"engine": {"url": None, "arguments": ["--no-such-option"]}})
    with pytest.raises(tuner.errors.UserError, match=r"vLLM did not start: .*no-such-option"):
        tuner.train(config, runs=tmp_path)
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == '["rules.py"]'
