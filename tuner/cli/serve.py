"""`tuner serve`: a run or a model behind OpenAI's endpoints, for this machine alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tuner.cli.trust import Trust
from tuner.printable import echo

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuner.serving.foreign_servers import Asked

TOKEN = "TUNER_SERVE_TOKEN"
"""Environment variable with the token, which the command line shows to every user of the machine."""
PATIENCE = 600.0
"""Seconds of vLLM's start."""


def serve(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or model folder, or hub name.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Further arguments of vLLM or LMDeploy, behind --.")
    ] = None,
    engine: Annotated[
        Literal["auto", "own", "vllm", "lmdeploy"],
        typer.Option(help="Server; auto: vLLM or LMDeploy where installed, else our own, for trying out."),
    ] = "auto",
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests; default: that of its folder.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: a free one.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar=TOKEN, help="API key that requests must carry; default: none.")
    ] = None,
    print_command: Annotated[
        bool, typer.Option("--print", help="Print the command of vLLM or LMDeploy, and exit.")
    ] = False,
    template: Annotated[
        str, typer.Option(help='Our engine: chat template; "tokenizer": the model\'s own.')
    ] = "tokenizer",
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer; default: the model's limit.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Our engine: tokens of an answer whose request names no number.")
    ] = 1024,
    max_rows: Annotated[int, typer.Option(min=1, help="Our engine: answers generated together.")] = 64,
    max_cached_tokens: Annotated[
        int, typer.Option(min=1, help="Our engine: tokens whose keys and values are held; others wait.")
    ] = 65_536,
    trust: Trust = False,
) -> None:
    """Serve a model at /v1/chat/completions and /v1/completions; a reward model at /classify."""
    from tuner.errors import UserError
    from tuner.serving.foreign_servers import Asked, chosen_engine
    from tuner.stages.run_models import run_folder_of, usable_path

    kind = chosen_engine(engine)
    path = usable_path(model, trust=trust)
    name = name or Path(run_folder_of(model)).name or model
    asked = Asked(path, name, port, token, max_length, tuple(arguments or ()), trust)
    if kind == "own":
        if print_command or arguments:
            raise UserError("--print and arguments behind -- belong to vLLM or LMDeploy; add --engine vllm")
        _serve_own(asked, template, (max_new_tokens, max_rows, max_cached_tokens))
        return
    if template != "tokenizer":
        raise UserError(f"--template: {kind} takes the model's own; write --engine own, or leave it out")
    serve_foreign = _serve_vllm if kind == "vllm" else _serve_lmdeploy
    serve_foreign(asked, print_command)


def _serve_own(asked: Asked, template: str, limits: tuple[int, int, int]) -> None:
    """Serve with our own engine until the command is interrupted. limits: new tokens, rows, cached tokens."""
    from tuner.models.locate import locate
    from tuner.serving.listener import listening, run

    has_score = locate(asked.model, weights=False).has_score
    with listening(asked.port) as listener:
        app, close = _score_app(asked, template) if has_score else _chat_app(asked, template, limits)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        echo(f"{asked.name} is served at {url}{'/classify' if has_score else '/v1'}; Ctrl-C ends")
        run(app, listener, close)
    echo(f"{asked.name} is no longer served", sys.stderr)


def _score_app(asked: Asked, template: str) -> tuple[Any, Callable[[], None]]:
    from tuner.models.scorer import open_scorer
    from tuner.serving.score_app import ScoreApp

    scorer = open_scorer(asked.path, template=template, trust=asked.trust)
    return ScoreApp(scorer, asked.name, asked.token).app, lambda: None


def _chat_app(asked: Asked, template: str, limits: tuple[int, int, int]) -> tuple[Any, Callable[[], None]]:
    from tuner.models.chat import open_chat
    from tuner.serving.app import ChatApp
    from tuner.serving.batcher import Batcher
    from tuner.serving.served_model import ServedModel

    max_new_tokens, max_rows, max_slots = limits
    chat = open_chat(asked.path, template=template, trust=asked.trust)
    served = ServedModel(chat, asked.name, max_length=asked.max_length, max_new_tokens=max_new_tokens)
    batcher = Batcher(chat.loaded.model, max_rows=max_rows, max_slots=max_slots)
    return ChatApp(served, batcher, asked.token).app, batcher.close


def _serve_vllm(asked: Asked, print_only: bool) -> None:
    """Run vLLM's server until the command is interrupted, or the server dies."""
    import contextlib
    from dataclasses import replace

    from tuner.errors import UserError
    from tuner.rollout.vllm_client import VLLMClient
    from tuner.rollout.vllm_server import VLLMServer, usable_port
    from tuner.serving.foreign_servers import vllm_settings

    if not print_only:
        asked = replace(asked, port=usable_port(asked.port))
    settings, folder = vllm_settings(asked)
    echo(settings.shown(folder))
    if print_only:
        return
    server = VLLMServer(settings, None)
    # Ctrl-C is the way this command ends
    with contextlib.closing(server), contextlib.suppress(KeyboardInterrupt):
        server.start(folder)
        server.wait(VLLMClient(server.url, timeout=30.0, key=asked.token).is_ready, PATIENCE)
        echo(f"{asked.name} is served at {server.url}/v1; Ctrl-C ends")
        raise UserError(
            f"vLLM's server ended by itself, with exit code {server.join()}: see its output above"
        )


def _serve_lmdeploy(asked: Asked, print_only: bool) -> None:
    """Run LMDeploy's server until the command is interrupted, or the server dies."""
    import contextlib
    import shlex
    import subprocess

    from tuner.errors import UserError
    from tuner.models.tool_python import tool_environment
    from tuner.serving.foreign_servers import lmdeploy_command

    command = lmdeploy_command(asked)
    echo(shlex.join("TOKEN" if part == asked.token else part for part in command))
    if print_only:
        return
    with contextlib.suppress(KeyboardInterrupt):  # which the server gets, too
        code = subprocess.call(command, env=tool_environment())
        raise UserError(f"LMDeploy's server ended by itself, with exit code {code}")
