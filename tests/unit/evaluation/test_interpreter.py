"""The interpreter for blocks that models write, and the turns in which they call it."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tuner.config import Model
from tuner.evaluation.interpreter import Interpreter
from tuner.evaluation.interpreter_turns import InterpreterAnswers
from tuner.evaluation.task_model import TaskModel, open_task_model
from tuner.evaluation.task_rows import read_task

NAMELESS = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML without the names of turns."""
INTERPRETER = Interpreter(seconds=1, memory=256 * 2**20, characters=400)


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(6 * 7)", "42"),
        ("x = 1", ""),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("print('before')\nwhile True: pass", "before\nTimeoutError: the block ran for more than 1 seconds"),
        ("import time; time.sleep(60)", "TimeoutError: the block ran for more than 1 seconds"),
        ("x = bytearray(10**9)", "MemoryError"),
        ("open('file', 'wb').write(b'x' * 10**7)", "File too large"),
        ("print('y' * 10**6)", "y" * 400),
        ("import os; os.fork()", "PermissionError: os.fork"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError: subprocess.Popen"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "PermissionError: socket.getaddrinfo"),
        ("import os; print(os.listdir(), 'TOKEN' in str(os.environ))", "[] False"),
        ("open('output', 'w').write('x'); print(6 * 7)", "42"),
        ("import os, shutil; shutil.rmtree(os.getcwd()); print(6 * 7)", "42"),
        ("import os\nfor _ in range(1500): os.mkdir('d'); os.chdir('d')\nprint(6 * 7)", "42"),
        ("import ctypes; ctypes.CDLL(None).system(b'echo 42')", "PermissionError: ctypes.dlopen"),
        ("import ctypes; ctypes.pythonapi.system(b'echo 42')", "PermissionError: ctypes.dlsym"),
        (
            "from multiprocessing.util import spawnv_passfds\nspawnv_passfds(b'/bin/echo', [b'echo', b'42'], [])",
            "PermissionError: subprocess.Popen",
        ),
        ("import sys; del sys.modules['_posixsubprocess']; import subprocess", "PermissionError: import"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError: os.kill"),
        ("import numpy, multiprocessing, ctypes; print(numpy.arange(3).sum())", "3"),
        ("print(input())", "EOFError: EOF when reading a line"),
    ],
)
def test_blocks(code: str, output: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    before = {*Path(tempfile.gettempdir()).glob("tuner-block-*")}
    result = INTERPRETER.run(code)
    assert {*Path(tempfile.gettempdir()).glob("tuner-block-*")} <= before
    assert output in result
    assert output or not result
    assert len(result) < 600


class Scripted(TaskModel):
    """A model whose answers are given; everything else is real."""

    script: Sequence[Sequence[str]]
    seen: list[list[str]]

    def answers(self, prompts, max_new_tokens, stop=(), *, special_tokens=False):
        self.seen.append([str(self.loaded.tokenizer.decode(prompt)) for prompt in prompts])
        return list(self.script[len(self.seen) - 1])


@pytest.fixture(scope="module")
def loaded():
    model = Model(path="tuner:tiny")
    return open_task_model(model, "fp32", chat_template=None, device=torch.device("cpu")).loaded


def scripted(loaded, template: str, script: Sequence[Sequence[str]]) -> Scripted:
    from tuner.data.template import Template

    if template == "nameless":
        loaded.tokenizer.chat_template = NAMELESS
        template = "tokenizer"
    model = Scripted(loaded, Template(template, loaded.tokenizer), frozenset())
    object.__setattr__(model, "script", script)
    object.__setattr__(model, "seen", [])
    return model


def rows(folder: Path):
    file = folder / "rows.jsonl"
    lines = [
        {"question": "What is 6 * 7?", "answer": "#### 42"},
        {"question": "And 1 + 1?", "answer": "#### 2"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return read_task(str(file))


@pytest.mark.parametrize(
    ("template", "call", "output"),
    [
        (
            "internlm2",
            "I compute.<|action_start|><|interpreter|>\n```python\nprint(6 * 7)\n```<|action_end|>",
            "<|im_start|>environment name=<|interpreter|>\n42<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "nameless",
            "I compute.\n```python\nprint(6 * 7)\n```",
            "<|im_start|>user\nOutput:\n42<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_the_output_of_a_block_is_the_next_turn(loaded, template, call, output, tmp_path: Path):
    model = scripted(loaded, template, [[call, "It is 2."], ["It is 42."]])
    answers = InterpreterAnswers(INTERPRETER)(model, rows(tmp_path), 64)
    assert answers == ["It is 42.", "It is 2."]
    [first, second] = model.seen
    assert [len(first), len(second)] == [2, 1]
    assert "You can run Python code" in first[0]
    assert second[0].endswith(output)
    assert call in second[0]
    assert ("system name=<|interpreter|>" in first[0]) == (template == "internlm2")


def test_blocks_end_after_some_rounds(loaded, tmp_path: Path):
    call = "```python\nprint(1)\n```"
    model = scripted(loaded, "nameless", [[call, call]] * 3)
    assert InterpreterAnswers(INTERPRETER, rounds=2)(model, rows(tmp_path), 64) == [call, call]
    assert len(model.seen) == 3
