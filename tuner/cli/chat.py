"""`tuner chat`: a conversation with a run or a model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tuner.cli.trust import Trust
from tuner.printable import echo


def chat(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or model folder, or hub name.")],
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Send this message, print the answer, and exit.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
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

    chat_model = open_chat(usable_path(model, trust=trust), template=template, trust=trust)
    opening = [Turn("system", system)] if system else []

    def reply(turns: list[Turn]) -> Turn:
        pieces: list[str] = []
        for piece in chat_model.answer(
            turns, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
        ):
            # A model can write any bytes, also those that command a terminal.
            echo(piece, end="")
            pieces.append(piece)
        echo("")
        return Turn("assistant", "".join(pieces))

    if message is not None:
        reply([*opening, Turn("user", message)])
        return
    turns = list(opening)
    if sys.stdin.isatty():
        echo("Type a message. /clear starts over, /exit or Ctrl-D quits.")
    while (line := _read_line()) is not None and line != "/exit":
        if line == "/clear":
            turns = list(opening)
        elif line:
            turns.append(Turn("user", line))
            turns.append(reply(turns))


def _read_line() -> str | None:
    """A line of input, stripped; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
