"""`tuner serve`: its own server as a process, until Ctrl-C; the commands of other servers."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.conftest import ROOT
from tuner.cli.serve import TOKEN, serve
from tuner.errors import UserError
from tuner.rollout.vllm_server import PYTHON

app = typer.Typer()
app.command()(serve)


def output(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return result.output


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (PYTHON, TOKEN):
        monkeypatch.delenv(name, raising=False)


def test_it_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    """Ctrl-C in the midst of a stream: the stream ends with an error, the command cleanly."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tuner", "serve", "tuner:tiny", "--engine", "own", "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), TOKEN: "secret"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.fullmatch(r"tuner:tiny is served at (http://127\.0\.0\.1:\d+/v1); Ctrl-C ends\n", line)
    assert match, (line, process.communicate(timeout=60))
    assert "secret" not in line
    body = {"model": "tuner:tiny", "prompt": [300] * 9, "max_tokens": 2000, "n": 16, "stream": True}
    request = urllib.request.Request(
        f"{match[1]}/completions", json.dumps(body).encode(), {"Authorization": "Bearer secret"}
    )
    timer = threading.Timer(120, process.kill)
    timer.start()
    with urllib.request.urlopen(request) as response:
        begun = response.read(200)
        process.send_signal(signal.SIGINT)
        rest = response.read()
    _, err = process.communicate()
    timer.cancel()
    assert begun.startswith(b"data: {")
    assert b"this server is shutting down" in rest
    assert (process.returncode, err) == (0, "tuner:tiny is no longer served\n")


def words_of(line: str) -> list[str]:
    return shlex.split(line)


@pytest.fixture
def vllm_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, sys.executable)  # printed, not run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a LoRA adapter."""
    import torch

    from tuner.config import LoRA, Model
    from tuner.models.load import load_model
    from tuner.models.save import save_model

    loaded = load_model(
        Model(path="tuner:tiny"), precision="fp32", device=torch.device("cpu"), adapter=LoRA(r=4, alpha=8)
    )
    folder = tmp_path_factory.mktemp("runs") / "mine"
    save_model(loaded, folder / "model")
    return folder


@pytest.mark.usefixtures("vllm_python")
def test_vllm_serves_an_adapter_with_its_own_template_and_ends(adapter: Path) -> None:
    line = output(str(adapter), "--print", "--token", "secret", "--max-length", "300", "--", "--seed", "3")
    command = words_of(line)
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    model = adapter / "model"
    options = dict(itertools.pairwise(command))
    assert options["--lora-modules"] == f"mine={model}"
    assert options["--chat-template"] == str(model / "chat_template.jinja")
    assert options["--max-lora-rank"] == "8", "the least that vLLM has for rank 4"
    assert command[-2:] == ["--seed", "3"]
    assert (options["--max-model-len"], options["--host"]) == ("300", "127.0.0.1")
    assert command[len(command) - 1 - command[::-1].index("--generation-config") + 1] == str(model)
    assert "LlamaForCausalLM" in Path(options["--model"], "config.json").read_text()
    assert "secret" not in line


@pytest.mark.usefixtures("vllm_python")
def test_vllm_serves_a_complete_model_under_its_name(tmp_path: Path) -> None:
    from tuner.models.tiny import tiny_model_folder

    folder = tiny_model_folder("Qwen/Qwen3-8B", tmp_path / "exported")
    command = words_of(output(str(folder), "--print"))
    options = dict(itertools.pairwise(command))
    assert options["--model"] == str(folder)
    assert command[len(command) - command[::-1].index("--served-model-name")] == "exported"
    assert "--enable-lora" not in command
    assert options["--tool-call-parser"] == "hermes"
    reward = tiny_model_folder("Qwen/Qwen3-8B", tmp_path / "reward", score=True)
    command = words_of(output(str(reward), "--print"))
    assert command[command.index("--runner") + 1] == "pooling"
    assert "--chat-template" not in command
    own = tiny_model_folder("internlm/internlm2-7b", tmp_path / "own", score=True)
    assert "--layout llama" in refused(str(own), "--print")


def test_lmdeploy_serves_complete_models(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no command `lmdeploy`" in refused("tuner:tiny", "--engine", "lmdeploy")
    (tmp_path / "lmdeploy").write_text("#!/bin/sh\n")
    (tmp_path / "lmdeploy").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = words_of(output("tuner:tiny", "--print", "--token", "secret", "--port", "7"))
    assert command[:3] == ["lmdeploy", "serve", "api_server"]
    assert command[-2:] == ["--api-keys", "TOKEN"]
    assert "`tuner merge" in refused(str(adapter), "--print")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tuner:tiny", "--print"), "add --engine vllm"),
        (("tuner:tiny", "--max-length", "9999"), "at most 2,048 tokens"),
        (("no-such-model/here",), "no-such-model/here"),
        (("tuner:tiny", "--engine", "vllm"), "no python of vLLM's environment"),
    ],
)
def test_what_cannot_be_served_is_refused(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(*arguments)


def test_a_used_port_is_refused() -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert "cannot be used" in refused("tuner:tiny", "--port", str(listener.getsockname()[1]))
