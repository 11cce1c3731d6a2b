"""`tuner chat`: a conversation with a run or a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli.trust import Trust
from tuner.printable import echo, half_character

if TYPE_CHECKING:
    from tuner.data.conversation import ToolCall, Turn


def chat(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or model folder, or hub name.")],
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Send this message, print the answer, and exit.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with a list of tools as OpenAI writes them; you type the results of calls."
        ),
    ] = None,
    template: Annotated[
        str, typer.Option(help='Chat template; "tokenizer": the model\'s own.')
    ] = "tokenizer",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0: greedy decoding.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Probability mass of nucleus sampling.")
    ] = 1.0,
    trust: Trust = False,
) -> None:
    """Chat with a run or a model. /clear starts over, /exit or Ctrl-D quits."""
    from tuner.data.conversation import Turn
    from tuner.models.chat import open_chat
    from tuner.stages.run_models import usable_path

    for option, text in (("--message", message), ("--system", system)):
        _refuse_bytes(text or "", option)
    callable_tools = () if tools is None else _read_tools(tools)
    chat_model = open_chat(usable_path(model, trust=trust), template=template, trust=trust)
    opening = [Turn("system", system)] if system else []
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}

    def reply(turns: list[Turn]) -> Turn:
        return _print_answer(chat_model.reply(turns, callable_tools, **sampling))

    if message is not None:
        reply([*opening, Turn("user", message)])
        return
    turns = list(opening)
    if sys.stdin.isatty():
        echo("Type a message. /clear starts over, /exit or Ctrl-D quits.")
    while (line := _read_line("> ")) is not None and line != "/exit":
        if line == "/clear":
            turns = list(opening)
        elif line:
            turns += [Turn("user", line)]
            turns.append(reply(turns))
            while results := _results(turns[-1]):
                turns += results
                turns.append(reply(turns))


def _print_answer(parts: Iterator[str | ToolCall]) -> Turn:
    """Print an answer as it comes; returns it as a turn."""
    import json

    from tuner.data.conversation import ToolCall, Turn

    text: list[str] = []
    calls: list[ToolCall] = []
    for part in parts:
        if isinstance(part, ToolCall):
            if text or calls:
                echo("")
            calls.append(part)
            echo(f"{part.name}({json.dumps(part.arguments, ensure_ascii=False)})", end="")
        else:
            # A model can write any bytes, also those that command a terminal.
            echo(part, end="")
            text.append(part)
    echo("")
    return Turn("assistant", "".join(text), tool_calls=tuple(calls))


def _results(answer: Turn) -> list[Turn]:
    """The results of an answer's calls, as the user types them; none where the input ends."""
    from tuner.data.conversation import Turn

    results: list[Turn] = []
    for call in answer.tool_calls:
        line = _read_line(f"{call.name} = ")
        if line is None:
            return []
        results.append(Turn("tool", line, name=call.name, call_id=call.id))
    return results


def _read_tools(file: Path) -> tuple[Mapping[str, Any], ...]:
    """The tools in a file. Raises UserError where it has none."""
    import json

    from tuner.data.turns import is_json, read_tools
    from tuner.errors import UserError

    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--tools {file}: no JSON file with a list of tools ({error})") from error
    if not is_json(text):
        raise UserError(f"--tools {file}: is nested too deeply, or has half of a character; correct it")
    tools = read_tools({"tools": values}, f"--tools {file}")
    if not tools:
        raise UserError(f"--tools {file}: it has no tool; leave the option out")
    return tools


def _read_line(prompt: str) -> str | None:
    """A line of input, stripped; None at its end. Raises UserError where it is no UTF-8."""
    try:
        line = input(prompt if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        _refuse_bytes(error.object[error.start : error.end].decode(errors="surrogateescape"), "the input")
        raise
    _refuse_bytes(line, "the input")
    return line


def _refuse_bytes(text: str, where: str) -> None:
    """Raise UserError for a text of bytes that are no UTF-8, which Python reads as halves of characters."""
    from tuner.errors import UserError

    if (half := half_character(text)) is not None:
        raise UserError(f"{where}: has bytes that are no UTF-8 (read as {half}); write it in UTF-8")
