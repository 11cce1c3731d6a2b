"""The command line itself: its version, completion, and how a mistake is answered, soon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tuner
from tests.conftest import ROOT
from tests.equivalence.conftest import SMALL
from tuner.cli.main import app, main
from tuner.config import override, to_json

QUICK = """
import sys
from tuner.cli.main import main
for line in sys.stdin:
    sys.argv = ["tuner", *line.split()]
    try:
        main()
    except SystemExit as exit:
        heavy = [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
        print(exit.code, heavy, flush=True)
"""
"""Runs commands in one process, and prints after each its exit code and the heavy libraries imported so far."""


def usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a wrong command line is answered with."""
    monkeypatch.setattr(sys, "argv", ["tuner", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    return capsys.readouterr().err


def test_full_memory_is_told_in_a_sentence(monkeypatch, capsys) -> None:
    """By commands that have no run to go on with; `tuner train` names the fields to lower (test_full_memory.py)."""
    import torch

    from tuner.models import chat

    def fail(*arguments: object, **options: object) -> None:
        torch.empty(2**50)  # more than the addresses of a process

    monkeypatch.setattr(chat, "open_chat", fail)
    message = usage(monkeypatch, capsys, "chat", "tuner:tiny", "-m", "hello")
    assert message.startswith("tuner chat: this machine's memory is full; ")
    assert message.count("\n") == 1


def test_the_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"tuner {tuner.__version__}\n"


def test_a_shell_completes_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tuner"],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "_TUNER_COMPLETE": "complete_bash",
            "COMP_WORDS": "tuner tr",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["train"]


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}]
)
def test_a_console_that_cannot_show_chinese_gets_something_else(
    locale: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "from tuner.config import load_config, override\n"
        'config = override(load_config("quickstart_sft"), {"name": None, "data.system": "请用中文回答"})\n',
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "tuner", "show", "mine.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | locale,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "请用" in done.stdout.decode() or r"\u8bf7\u7528" in done.stdout.decode()


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("--lr", "optimizer.lr=..."),
        ("--max-steps", "max_steps=..."),
        ("--temperature", "sampling.temperature=..."),
    ],
)
def test_an_unknown_option_names_the_field_of_that_name(
    option: str, field: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = usage(monkeypatch, capsys, "train", "quickstart_sft", option, "1")
    assert f"no such option: {option}" in text
    assert field in text
    assert len(text.splitlines()) == 1
    assert "field" not in usage(monkeypatch, capsys, "train", "quickstart_sft", "--nonsense")


def test_what_the_config_alone_can_refuse_imports_no_torch(tmp_path: Path) -> None:
    begun = tmp_path / "runs" / "begun"
    begun.mkdir(parents=True)
    (begun / "config.json").write_text(to_json(override(SMALL, {"name": "begun", "optimizer.lr": 1.0})))
    (begun / "metrics.jsonl").write_text('{"step": 1}\n')
    commands = {
        "train nosuch.py": "no such config file",
        "train quickstart_sft optimizer.lr=-1": "greater than 0",
        "train quickstart_sft lr=1": "did you mean 'optimizer.lr'",
        "train quickstart_sft model.path=runs/none": "no such model folder",
        'train quickstart_sft data.files=["none.jsonl"]': "no such file",
        'check quickstart_sft data.files=["none/*.jsonl"]': "no file matches this pattern",
        'data quickstart_sft data.files=["none.jsonl"]': "no such file",
        "train quickstart_sft evaluation.score=none.py:score": "no such file",
        'train quickstart_reward conditions={"polite":"none.txt"}': "none.txt",
        "train quickstart_sft name=begun": "begun with another config",
        "train quickstart_sft --lr=1": "optimizer.lr=...",
    }
    done = subprocess.run(
        [sys.executable, "-c", QUICK],
        input="".join(f"{command}\n" for command in commands),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["2 []"] * len(commands), done.stderr
    for sentence, line in zip(commands.values(), done.stderr.splitlines(), strict=True):
        assert sentence in line
