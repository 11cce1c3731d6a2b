"""`tuner` as a user's shell would run it, without paying its imports every time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

SERVER = """
import json, os, sys
from tuner.cli.main import main
import tuner.models.chat, tuner.models.merge, tuner.stages.checking, tuner.stages.sft, tuner.training.progress
import bitsandbytes, peft, transformers

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            mode = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(request[name], mode), number)
        sys.argv = ["tuner", *request["arguments"]]
        sys.stdin = open(0, encoding="utf-8")
        raise SystemExit(main())  # a traceback goes to stderr, with code 1, as from any program
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""A process that has imported what the verbs use and forks for every command: a real process, but for 4 s less."""


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def _server() -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    yield process
    process.communicate()


@pytest.fixture
def tuner(_server: subprocess.Popen[str], tmp_path: Path) -> Callable[..., Done]:
    """Run a command in the test's own folder: tuner("train", "mine.py", "max_steps=2")."""

    def run(
        *arguments: object, cwd: Path = tmp_path, typed: str = "", env: dict[str, str] | None = None
    ) -> Done:
        files = {name: tmp_path / f".{name}" for name in ("stdin", "stdout", "stderr")}
        files["stdin"].write_text(typed)
        request = {"arguments": [str(argument) for argument in arguments], "cwd": str(cwd), "env": env or {}}
        request |= {name: str(file) for name, file in files.items()}
        assert _server.stdin is not None
        assert _server.stdout is not None
        print(json.dumps(request), file=_server.stdin, flush=True)
        code = _server.stdout.readline()
        assert code, "the process that runs the commands is gone"
        return Done(int(code), files["stdout"].read_text(), files["stderr"].read_text())

    return run
