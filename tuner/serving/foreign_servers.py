"""vLLM and LMDeploy: the command lines by which they answer as the run does."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tuner.config import Model
from tuner.data.template import Template
from tuner.data.tool_calls import tool_format_of
from tuner.errors import UserError
from tuner.models.internlm2 import MODEL_TYPE
from tuner.models.locate import Location, locate
from tuner.models.model_file import read_model_file
from tuner.models.served import adapter_rank
from tuner.models.tokenizer import read_tokenizer
from tuner.rollout.vllm_base import served_base
from tuner.rollout.vllm_server import ServerSettings, find_python, max_rank

Engine = Literal["own", "vllm", "lmdeploy"]
FOLDER = Path("runs/served")
"""Where a base is written that vLLM cannot read as it is."""
_TEMPLATE, _GENERATION = "chat_template.jinja", "generation_config.json"


@dataclass(frozen=True)
class Asked:
    """What the user asks of a server."""

    path: str
    name: str
    """The model's, in requests."""
    port: int
    token: str | None
    max_length: int | None
    arguments: Sequence[str]
    trust: bool

    @property
    def model(self) -> Model:
        return Model(path=self.path, trust_remote_code=self.trust)


def chosen_engine(engine: Literal["auto", "own", "vllm", "lmdeploy"]) -> Engine:
    """The engine that was asked for; with auto, the first that is installed."""
    if engine != "auto":
        return engine
    try:
        find_python(None)
    except UserError:
        return "lmdeploy" if shutil.which("lmdeploy") else "own"
    return "vllm"


@dataclass(frozen=True)
class VLLMSettings(ServerSettings):
    """How vLLM is started for users."""

    token: str | None = None

    def environment(self, key: str | None) -> dict[str, str]:
        """As for rollouts, but with the user's token instead of a key, and without adapters loaded at run time."""
        values = super().environment(self.token)
        values.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)
        return values

    def shown(self, model: Path) -> str:
        """The command to type elsewhere."""
        # without our own script, which ends the server with this process, and its arguments
        return shlex.join(
            [str(self.python), "-m", "vllm.entrypoints.openai.api_server", *self.command(model)[4:]]
        )


def vllm_settings(asked: Asked) -> tuple[VLLMSettings, Path]:
    """How vLLM serves a model, and the folder that it loads, which may be written now.

    Raises UserError where vLLM is not installed, or would not compute what tuner does.
    """
    python = find_python(None)
    location = locate(asked.model)
    has_adapter = location.adapter_folder is not None
    if location.has_score and (has_adapter or _is_internlm2(location)):
        raise UserError(
            f"{asked.path}: vLLM serves a complete reward model in a layout it knows; write one by `tuner export "
            f"{asked.path} FOLDER --layout llama` and serve FOLDER, or write --engine own"
        )
    settings = VLLMSettings(
        python=python,
        precision=location.precision,
        max_rank=max_rank(adapter_rank(location)) if has_adapter else None,
        processed_logprobs=False,
        max_length=asked.max_length,
        on_gpu=torch.cuda.is_available(),
        port=asked.port,
        arguments=(*_vllm_arguments(asked, location), *asked.arguments),
        token=asked.token,
    )
    if location.has_score:
        return settings, location.base_folder
    name = f"{location.reference.fingerprint[:12]}-{location.reference.quantization or 'plain'}-{location.precision}"
    return settings, served_base(asked.model, FOLDER / name, location.precision)


def _vllm_arguments(asked: Asked, location: Location) -> list[str]:
    """What a server for users has besides; where an option is given twice, the last one counts."""
    folder = location.folder.absolute()
    if location.has_score:
        return ["--served-model-name", asked.name, "--runner", "pooling"]
    if location.adapter_folder is None:
        arguments = ["--served-model-name", asked.name]
    else:
        # the base's own name stays another: its answers are not the run's
        arguments = ["--lora-modules", f"{asked.name}={folder}"]
    # a run's tokenizer, template and end tokens: of an adapter, vLLM would take its base's without a word
    if (folder / _TEMPLATE).is_file():
        arguments += ["--chat-template", str(folder / _TEMPLATE)]
    if (folder / _GENERATION).is_file():
        arguments += ["--generation-config", str(folder)]
    if (parser := _call_parser(location, asked.trust)) is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    return arguments


def _call_parser(location: Location, trust: bool) -> str | None:
    """vLLM's parser of the calls that a model's template writes."""
    try:
        tokenizer = read_tokenizer(location.tokenizer_folder, trust_remote_code=trust)
        tool_format = tool_format_of(Template("tokenizer", tokenizer))  # pyright: ignore[reportArgumentType]
    except UserError:  # it has no template
        return None
    return None if tool_format is None else tool_format.vllm_parser


def lmdeploy_command(asked: Asked) -> list[str]:
    """LMDeploy's server of a complete model. Raises UserError where it is not installed, or the model is an adapter."""
    if shutil.which("lmdeploy") is None:
        raise UserError("no command `lmdeploy` on the PATH; install LMDeploy, or write --engine own")
    location = locate(asked.model)
    if location.adapter_folder is not None or location.has_score:
        raise UserError(
            f"{asked.path}: LMDeploy renders an adapter's chats by its base's template, and scores nothing over HTTP; "
            f"write a complete language model by `tuner merge {asked.path} FOLDER`, and serve FOLDER"
        )
    command = ["lmdeploy", "serve", "api_server", str(location.base_folder), "--model-name", asked.name]
    command += ["--server-name", "127.0.0.1", "--server-port", str(asked.port)]
    if asked.max_length is not None:
        command += ["--session-len", str(asked.max_length)]
    if asked.token is not None:
        command += ["--api-keys", asked.token]
    return [*command, *asked.arguments]


def _is_internlm2(location: Location) -> bool:
    return read_model_file(location.base_folder).model_type == MODEL_TYPE
