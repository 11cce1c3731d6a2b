"""`tuner` as a user's shell would run it, without paying its imports every time."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tuner.models.arithmetic import precision_notes

PRECISION_NOTES = precision_notes(torch.device("cpu"), "bf16")
"""What every run in bf16 says on this CPU: nothing where it has bf16 arithmetic."""
SERVER = """
import gc, json, os, sys, traceback
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as main does without a terminal, before the imports
from tuner.cli.main import main
import tuner.models.chat, tuner.models.merge, tuner.stages.check, tuner.stages.sft.loop
import tuner.display.data_page, tuner.display.data_terminal, tuner.display.progress
from accelerate import Accelerator
from transformers import LlamaForCausalLM, LlamaTokenizerFast
from tuner.models.adapter_kinds import peft_library
peft_library()
gc.freeze()

def run(request):
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(request[name], os.O_RDWR | os.O_CREAT), number)
    sys.argv = ["tuner", *request["arguments"]]
    try:
        main()
    except SystemExit as exit:
        return exit.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if (child := os.fork()) == 0:
        code = run(request)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""A process that has imported what the verbs use, and forks for every command: the 4 s of imports are paid once."""


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str
    seconds: float


@pytest.fixture(scope="session")
def _server() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.communicate()


@pytest.fixture
def tuner(
    _server: subprocess.Popen[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Done]:
    """Run a command in the test's own folder: tuner("train", "mine.py", "max_steps=2")."""

    def run(
        *arguments: object, cwd: Path = tmp_path, typed: str = "", env: dict[str, str] | None = None
    ) -> Done:
        streams = tmp_path_factory.mktemp("streams")
        files = {name: streams / name for name in ("stdin", "stdout", "stderr")}
        files["stdin"].write_text(typed)
        request = {"arguments": [str(argument) for argument in arguments], "cwd": str(cwd), "env": env or {}}
        request |= {name: str(file) for name, file in files.items()}
        assert _server.stdin is not None
        assert _server.stdout is not None
        started = time.monotonic()
        print(json.dumps(request), file=_server.stdin, flush=True)
        code = _server.stdout.readline()
        assert code, "the process that runs the commands is gone"
        seconds = time.monotonic() - started
        return Done(int(code), files["stdout"].read_text(), files["stderr"].read_text(), seconds)

    return run
