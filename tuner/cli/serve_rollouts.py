"""`tuner serve-rollouts`: a vLLM server that answers the prompts of runs, for this machine alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.trust import Trust
from tuner.printable import echo

if TYPE_CHECKING:
    from tuner.rollout.vllm_server import VLLMServer


def serve_rollouts(
    model: Annotated[
        str, typer.Argument(help="The runs' policy: run, checkpoint or model folder, or hub name.")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Further arguments of vLLM's own server, behind --.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: a free one.")] = 8000,
    max_lora_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Largest rank of the runs' adapters; default: that of the model's, or 64."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="The runs' precision, bf16 or fp32; default: the model's.")
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="The runs' policy.quantization, nf4 or int8: the base is served dequantized."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="The runs' sampling.temperature.")] = 1.0,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer; default: the model's limit.")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Where the base is written that vLLM cannot read as it is.")
    ] = Path("runs/served"),
    python: Annotated[
        str | None,
        typer.Option(
            help="Python of vLLM's environment; default: $TUNER_VLLM_PYTHON or .venv-vllm/bin/python."
        ),
    ] = None,
    patience: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the server's start.")] = 600.0,
    trust: Trust = False,
) -> None:
    """Serve the base of a policy with vLLM, for runs with engine=VLLM(url=...), which load their adapters into it.

    The server has a key, $VLLM_API_KEY or a new one in a file that only you can read; runs on this machine find it.
    """
    from tuner.cli.merge import parse_precision
    from tuner.rollout.vllm_base import ServedBase
    from tuner.rollout.vllm_server import VLLMServer, find_python, usable_port
    from tuner.stages.run_models import usable_path

    environment, port = find_python(python), usable_port(port)
    base = ServedBase.of(
        usable_path(model, trust=trust),
        None if precision is None else parse_precision(precision, "--precision"),
        quantization,
        max_lora_rank,
        trust,
    )
    echo(f"{model}: base for vLLM, rank {base.max_rank} or less", sys.stderr)
    settings = base.settings(environment, port, temperature, max_length, tuple(arguments or ()))
    _serve(VLLMServer(settings, None), base.written(folder), patience)


def _serve(server: VLLMServer, model: Path, patience: float) -> None:
    """Serve until the command is interrupted, or the server dies."""
    import contextlib

    from tuner.errors import UserError
    from tuner.rollout.vllm_client import VLLMClient, keep_key

    with keep_key(server.url, server.key), contextlib.closing(server):
        server.start(model)
        server.wait(VLLMClient(server.url, timeout=30.0).is_ready, patience)
        echo(f'{model} is served; in a config: engine=VLLM(url="{server.url}"); Ctrl-C ends')
        with contextlib.suppress(KeyboardInterrupt):  # the way this command ends
            raise UserError(
                f"the vLLM server ended by itself, with exit code {server.join()}: see its output above"
            )
