"""`tuner chat`: talk to a run or a model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def chat(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or hub name.")],
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Say this, print the answer, leave.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System turn.")] = None,
    template: Annotated[
        str, typer.Option(help='Chat template; "tokenizer" is the model\'s own.')
    ] = "tokenizer",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token always.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampled from.")] = 1.0,
) -> None:
    """Talk to a run or a model. /clear forgets the conversation, /exit or Ctrl-D leaves."""
    from tuner.data.conversation import Turn
    from tuner.models.chat import open_chat
    from tuner.printable import printable

    partner = open_chat(model, template=template)
    beginning = [Turn("system", system)] if system else []

    def reply(turns: list[Turn]) -> Turn:
        pieces = []
        for piece in partner.answer(
            turns, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
        ):
            typer.echo(printable(piece), nl=False)
            pieces.append(piece)
        typer.echo()
        return Turn("assistant", "".join(pieces))

    if message is not None:
        reply([*beginning, Turn("user", message)])
        return
    turns = list(beginning)
    if sys.stdin.isatty():
        typer.echo("Type a message. /clear forgets the conversation, /exit or Ctrl-D leaves.")
    while (said := _read()) is not None and said != "/exit":
        if said == "/clear":
            turns = list(beginning)
        elif said:
            turns.append(Turn("user", said))
            turns.append(reply(turns))


def _read() -> str | None:
    """A line from whoever talks; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
