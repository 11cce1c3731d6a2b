"""What rows, models and names hold is shown in terminals and pages, and commands nothing there."""

import ast
import io
import json
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tuner.display.rich_text import rich_text
from tuner.display.table import print_table
from tuner.errors import UserError
from tuner.printable import echo, printable, printable_json, safe

HOSTILE = "\x1b]0;title\x07\x9b2J\u202e\ud800\U000e0041<b>"
SHOWN = r"\x1b]0;title\x07\x9b2J\u202e\ud800\U000e0041<b>"
TUNER = ROOT / "tuner"


def test_texts_of_all_languages_stay() -> None:
    text = "你好\n\tá 🙂\u3000quatre\u00a0vingts \u00e9"
    assert printable(text) == text
    assert rich_text(text).plain == text


def test_control_and_direction_characters_and_surrogates_are_escaped() -> None:
    assert printable(HOSTILE) == SHOWN
    assert safe(HOSTILE) == SHOWN.replace("<", "&lt;").replace(">", "&gt;")
    assert rich_text(f"[red]{HOSTILE}").plain == f"[red]{SHOWN}"


def test_json_keeps_its_value() -> None:
    value = {HOSTILE: [HOSTILE, "你好\n"], "n": 1.5}
    for indent in (None, 2):
        text = printable_json(value, indent)
        assert json.loads(text) == value
        assert "你好" in text
        assert all(character.isprintable() or character == "\n" for character in text)


def test_errors_that_quote_rows_are_printable_for_whoever_shows_them() -> None:
    assert str(UserError(f"a.jsonl:1: {HOSTILE}")) == f"a.jsonl:1: {SHOWN}"


def test_echo_and_tables_escape(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    echo(HOSTILE, stream, end="")
    assert stream.getvalue() == SHOWN
    print_table(("name", "value"), [("a", HOSTILE), (HOSTILE, "b")])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{'a':<{len(SHOWN)}}  {SHOWN}"
    assert second == f"{SHOWN}  b"


def names_used(file: Path) -> set[str]:
    """Names that a file imports or calls: `html.escape`, `rich.text.Text`, `print`, `typer.echo`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            names.add(ast.unparse(node.func))
    return names


@pytest.mark.parametrize(
    ("pattern", "place"),
    [
        (r"print|(typer|click)\.(echo|secho)", "printable.py"),
        (r"html\.escape", "printable.py"),
        (r"rich\.text\.Text", "display/rich_text.py"),
        (r"rich\.progress\.TextColumn|rich\.markup\..*", None),
    ],
)
def test_there_is_one_way_out(pattern: str, place: str | None) -> None:
    """Escaping is decided in one place: no other file writes to a terminal or a page past it."""
    files = [
        file.relative_to(TUNER).as_posix()
        for file in sorted(TUNER.rglob("*.py"))
        if any(re.fullmatch(pattern, name) for name in names_used(file))
    ]
    assert files == ([place] if place else [])
