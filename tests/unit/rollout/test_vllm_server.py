"""A server of the run's own: started, killed, started again, and ended with all its processes.

The stand-in runs in vLLM's place, as a process; tests/vllm has the real one.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tuner.config import VLLM
from tuner.errors import UserError
from tuner.rollout import vllm_serving
from tuner.rollout.vllm_client import KEY, ServerAwayError, VLLMClient
from tuner.rollout.vllm_server import (
    DEFAULT_PYTHON,
    PYTHON,
    ServerSettings,
    VLLMServer,
    find_python,
    max_rank,
    usable_port,
)
from tuner.rollout.vllm_serving import Serving

STAND_IN = f'PYTHONPATH={ROOT} exec {sys.executable} -m tests.unit.rollout.vllm_stand_in "$@"'


def settings(python: Path, **changes: Any) -> ServerSettings:
    values = {"precision": "fp32", "max_rank": 8, "processed_logprobs": False, "max_length": 64}
    return ServerSettings(python, **{**values, "on_gpu": False, "port": usable_port(), **changes})  # type: ignore[arg-type]


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Callable[[str], VLLMServer]]:
    """A server whose python is a shell script."""
    monkeypatch.delenv(KEY, raising=False)
    servers: list[VLLMServer] = []

    def made(script: str) -> VLLMServer:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        servers.append(VLLMServer(settings(python), tmp_path / "vllm.log"))
        return servers[-1]

    yield made
    for one in servers:
        one.close()


def ready(server: VLLMServer) -> Callable[[], bool]:
    return VLLMClient(server.url, timeout=5.0, key=server.key).is_ready


def gone(process: int) -> bool:
    """Whether a process has ended, or is only waited for by the one that started it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Plain:
    """A policy without adapters, of which nothing is written: the server serves what it is told."""

    model = None


def test_a_killed_server_is_started_again_and_answers_what_it_owes(server, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_serving, "BACKOFF", 0.01)
    monkeypatch.setattr(vllm_serving, "write_served_policy", lambda loaded, folder: None)
    own, said = server(STAND_IN), list[str]()
    config = VLLM(concurrency=2, patience=60.0)
    serving = Serving(
        config,
        Plain(),  # type: ignore[arg-type]
        tmp_path / "policy",
        server=own,
        base=Path,
        say=said.append,
    )
    requests = [{"prompt": [1], "max_tokens": 3, "seed": seed} for seed in range(5)]
    assert len(serving.complete("0" * 64, requests)) == 5
    first = own.pid
    assert first is not None
    os.killpg(first, signal.SIGKILL)
    assert len(serving.complete("0" * 64, requests)) == 5
    assert own.pid not in (None, first)
    second = own.pid
    assert len(serving.complete("1" * 64, requests)) == 5
    assert own.pid != second, "other weights: a restart"
    complete, failing = serving._client.complete, iter([True, True])

    def hanging(*arguments: Any) -> None:
        if next(failing, False):
            raise ServerAwayError("no answer in time")
        complete(*arguments)

    third = own.pid
    monkeypatch.setattr(serving._client, "complete", hanging)
    assert len(serving.complete("1" * 64, requests)) == 5
    assert own.pid != third, "it hung twice"
    assert own.key not in (tmp_path / "vllm.log").read_text()
    serving.close()
    assert not own.is_running


def test_a_server_of_a_launched_run_meets_nobody_but_itself(tmp_path):
    """As vLLM does when it starts: torch.distributed in a process that is the only one of its group."""
    script = """
import datetime, os, socket, torch
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
torch.distributed.init_process_group(
    "gloo", init_method=address, world_size=1, rank=0, timeout=datetime.timedelta(seconds=5)
)
print("met", os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_RANK"), os.environ["HOME"])
torch.distributed.destroy_process_group()
"""
    (tmp_path / "server.py").write_text(script)
    (tmp_path / "rank.py").write_text(
        "import subprocess, sys\n"
        "from pathlib import Path\n"
        "from tests.unit.rollout.test_vllm_server import settings\n"
        "environment = settings(Path(sys.executable)).environment(None)\n"
        f"sys.exit(subprocess.call([sys.executable, {str(tmp_path / 'server.py')!r}], env=environment))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    finished = subprocess.run(
        [*launch, str(tmp_path / "rank.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.stdout == f"met None None {os.environ['HOME']}\n", finished.stderr[-2000:]


def test_all_its_processes_end_with_it(server, tmp_path):
    own = server(f"sleep 100 & echo $! > {tmp_path}/child; {STAND_IN}")
    own.start(Path("model"))
    own.wait(ready(own), 60.0)
    child = int((tmp_path / "child").read_text())
    assert not gone(child)
    own.close()
    time.sleep(0.05)
    assert gone(child)


def test_one_that_dies_at_its_start_is_explained(server):
    own = server("echo 'INFO: hello'; echo 'ValueError: no \x1b[31mmemory'; echo bye; exit 1")
    own.start(Path("model"))
    with pytest.raises(UserError, match=r"vLLM did not start: ValueError: no \\x1b\[31mmemory"):
        own.wait(ready(own), 60.0)


def test_the_first_cause_of_a_death_is_told_not_what_refers_to_it(server):
    """As vLLM's log has it, behind that of an earlier start."""
    own = server("exit 1")
    own.log.write_text("ValueError: of the start before\n")
    own.start(Path("model"))
    with pytest.raises(UserError, match="it said nothing"):
        own.wait(ready(own), 60.0)
    log = [
        "(EngineCore pid=1) ERROR [core.py:9]     raise ValueError(",
        "(EngineCore pid=1) ERROR [core.py:9] ValueError: Free memory on device cuda:0 (5/80 GiB) on startup is less",
        "(EngineCore pid=1) ValueError: Free memory on device cuda:0 (5/80 GiB) on startup is less",
        "(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    (own.log.parent / "words").write_text("\n".join(log))
    own = server(f"cat {own.log.parent}/words; exit 1")
    own.start(Path("model"))
    with pytest.raises(
        UserError, match=r"vLLM did not start: .*\[core.py:9\] ValueError: Free memory on device"
    ):
        own.wait(ready(own), 60.0)


def test_a_server_on_the_gpu_that_trains_takes_a_share_of_what_is_free(monkeypatch):
    """As of a GPU of 80 GiB: how much it has free is the only part of it that the command depends on."""
    freed = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: freed.append(True))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (61 * 2**30, 80 * 2**30))
    beside = {"on_gpu": True, "shares_gpu": True}
    command = settings(Path("/python"), **beside).command(Path("/model"))
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.38"
    assert freed == [True]
    for argument in ("--gpu-memory-utilization=0.4", "--gpu_memory_utilization=0.4"):
        command = settings(Path("/python"), arguments=(argument,), **beside).command(Path("/model"))
        assert "--gpu-memory-utilization" not in command
    for alone in ({"on_gpu": True}, {"on_gpu": False, "shares_gpu": True}):
        assert "--gpu-memory-utilization" not in settings(Path("/python"), **alone).command(Path("/model"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (7 * 2**30, 80 * 2**30))
    with pytest.raises(
        UserError, match=r"has 7\.0 of 80\.0 GiB free, too little for a server beside the trainer"
    ):
        settings(Path("/python"), **beside).command(Path("/model"))


def test_one_that_never_answers_is_ended(server):
    own = server("exec sleep 100")
    own.start(Path("model"))
    with pytest.raises(UserError, match=r"did not answer within 0.3 s of its start; raise engine.patience"):
        own.wait(ready(own), 0.3)
    assert not own.is_running


def test_its_command_and_environment_say_what_it_serves(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    cpu = settings(Path("/python"), arguments=("--seed=3",), port=4)
    words = " ".join(cpu.command(Path("/model")))
    assert words.startswith("/python -I ")
    for part in (
        *("--model /model", "--host 127.0.0.1 --port 4", "--dtype float32", "--max-model-len 64"),
        *("--enable-lora --max-lora-rank 8", "--logprobs-mode raw_logprobs", "--enforce-eager"),
    ):
        assert f" {part}" in words
    assert words.endswith(" --seed=3")
    environment = cpu.environment("secret")
    assert environment[KEY] == "secret"
    assert "secret" not in words
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    full = settings(
        Path("/python"),
        max_rank=None,
        on_gpu=True,
        max_length=None,
        processed_logprobs=True,
        precision="bf16",
    )
    words = " ".join(full.command(Path("/model")))
    for part in ("--enable-lora", "--enforce-eager", "--max-model-len"):
        assert part not in words
    assert "--dtype bfloat16" in words
    assert "--logprobs-mode processed_logprobs" in words
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in full.environment(None)


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (64, 64), (65, 128), (512, 512)])
def test_ranks_are_those_that_vllm_takes(rank, served):
    assert max_rank(rank) == served


def test_a_larger_rank_is_refused():
    with pytest.raises(UserError, match="rank 513 is more than vLLM loads"):
        max_rank(513)


def test_the_environment_is_named_or_where_make_puts_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PYTHON, raising=False)
    with pytest.raises(UserError, match=r"`make vllm` makes it"):
        find_python(None)
    Path(DEFAULT_PYTHON).parent.mkdir(parents=True)
    Path(DEFAULT_PYTHON).symlink_to(sys.executable)
    assert find_python(None) == tmp_path / DEFAULT_PYTHON
    monkeypatch.setenv(PYTHON, sys.executable)
    assert find_python(None) == Path(sys.executable)
    with pytest.raises(UserError, match="elsewhere"):
        find_python("elsewhere")


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot be used"):
            usable_port(port)
