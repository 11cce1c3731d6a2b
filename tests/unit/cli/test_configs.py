"""`tuner configs`: the shipped configs, listed without executing them."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tuner.cli.configs import configs, first_line
from tuner.resources import configs_folder

app = typer.Typer()
app.command()(configs)


def test_every_shipped_config_is_listed_with_its_description() -> None:
    entries = json.loads(CliRunner().invoke(app, ["--json"]).output)
    assert [entry["name"] for entry in entries] == sorted(file.stem for file in configs_folder().glob("*.py"))
    assert all(entry["about"] for entry in entries)
    lines = CliRunner().invoke(app).output.splitlines()
    assert [line.split()[0] for line in lines] == [entry["name"] for entry in entries]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('"""First.\n\nMore."""\nraise SystemExit', "First."),
        ("config = 1", ""),
        ("def (", "(not valid Python)"),
        ("", ""),
    ],
)
def test_files_are_not_executed(text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(text)
    assert first_line(file) == line


def test_a_file_in_another_encoding_is_listed_as_invalid(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_bytes('"""é"""'.encode("latin-1"))
    assert first_line(file) == "(not valid Python)"
