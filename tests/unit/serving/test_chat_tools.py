"""`tuner chat` with tools: a call is told from text, and its result, as typed, is read as in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.unit.serving.conftest import CODE, COMPUTE, INTERPRETER, QUESTION, TOOLS
from tuner.cli.chat import chat
from tuner.data.conversation import ToolCall, Turn
from tuner.errors import UserError
from tuner.models.chat import ChatModel

app = typer.Typer()
app.command()(chat)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    return file


def test_calls_are_printed_and_their_results_typed(taught_folder: Path, tools: Path) -> None:
    typed = f'{QUESTION["content"]}\n{{"celsius": 22}}\nWho are you?\n'
    result = CliRunner().invoke(
        app, [str(taught_folder), "--tools", str(tools)], typed, catch_exceptions=False
    )
    lines = [line for line in result.output.splitlines() if line]
    assert lines[:3] == ["I will look.", 'get_weather({"city": "Shanghai"})', "It is 22 degrees."]


def test_without_tools_a_call_is_shown_as_it_is_written(chat: ChatModel) -> None:
    turns = [Turn("system", INTERPRETER["content"], name="<|interpreter|>"), Turn("user", COMPUTE["content"])]
    (*pieces,) = chat.reply(turns)
    text = f"<|action_start|><|interpreter|>\n```python\n{CODE}\n```<|action_end|>"
    assert "".join(pieces) == text
    fed_back = [*turns, Turn("assistant", text), Turn("environment", "1024", name="<|interpreter|>")]
    assert "".join(chat.reply(fed_back)) == "It is 1024."
    call = ToolCall("interpreter", {"code": CODE}, "a1b2c3d4e")
    called = [*turns, Turn("assistant", "", tool_calls=(call,)), Turn("tool", "1024", call_id=call.id)]
    assert "".join(chat.reply(called)) == "It is 1024.", (
        "the interpreter's call and result are those of training"
    )


@pytest.mark.parametrize(
    ("content", "words"), [("{", "no JSON file"), ("[]", "has no tool"), ("[1]", "a tool")]
)
def test_what_is_no_list_of_tools_is_refused(tools: Path, content: str, words: str) -> None:
    tools.write_text(content)
    result = CliRunner().invoke(app, ["tuner:tiny", "--tools", str(tools)])
    assert isinstance(result.exception, UserError)
    assert words in str(result.exception)
