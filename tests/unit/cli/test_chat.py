"""`tuner chat`: what is no text, and files of tools that are none, are refused in a sentence."""

import io
import json
import sys
from pathlib import Path

import pytest

from tuner.cli.main import app
from tuner.errors import UserError


def chat(*options: str) -> None:
    app(["chat", "tuner:tiny", *options], standalone_mode=False)


@pytest.mark.parametrize("errors", ["surrogateescape", "strict"])
def test_input_that_is_no_utf_8(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    """Python reads it in either way, by the locale."""
    typed = io.TextIOWrapper(io.BytesIO(b"hi \xff\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", typed)
    with pytest.raises(UserError, match=r"the input: has bytes that are no UTF-8 \(read as \\udcff\)"):
        chat()


@pytest.mark.parametrize("option", ["--message", "--system"])
def test_options_that_are_no_utf_8(option: str) -> None:
    with pytest.raises(UserError, match=f"{option}: has bytes that are no UTF-8"):
        chat(option, "hi \udcff")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "no JSON file with a list of tools"),
        ("{", "no JSON file with a list of tools"),
        (json.dumps([{"name": "f", "description": "\ud800"}]), "half of a character"),
        ("[" * 300 + "]" * 300, "nested too deeply"),
    ],
)
def test_tools_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tools.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"tools.json: .*{message}"):
        chat("--tools", str(file), "-m", "hi")
