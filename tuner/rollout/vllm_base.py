"""The base that a vLLM server loads: where it lies, or is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from tuner.config import Model
from tuner.errors import UserError
from tuner.models.atomic_folder import write_atomically
from tuner.models.load import Precision, refuse_reward_model
from tuner.models.locate import locate
from tuner.models.served import adapter_rank, is_servable, write_served_base
from tuner.rollout.vllm_server import ServerSettings, max_rank

DEFAULT_RANK = 64
"""Largest rank of adapters where neither the user nor an adapter names one."""


def served_base(model: Model, folder: Path, precision: Precision) -> Path:
    """The folder of a policy's base for vLLM: its own where that will do, else `folder`, written if it is not."""
    if is_servable(model):
        return locate(model, precision).base_folder
    if not folder.is_dir():
        write_atomically(folder, lambda unfinished: write_served_base(model, unfinished, precision))
    return folder


@dataclass(frozen=True)
class ServedBase:
    """The base of a model that runs are to train adapters of."""

    model: Model
    precision: Precision
    max_rank: int

    @classmethod
    def of(
        cls,
        path: str,
        precision: Precision | None,
        quantization: str | None,
        rank: int | None,
        trust: bool,
    ) -> Self:
        """Raises UserError where there is no such policy, or vLLM could not load its adapter."""
        if quantization not in (None, "nf4", "int8"):
            raise UserError(f"--quantization {quantization}: there are nf4 and int8; leave it out for none")
        model = Model(path=path, quantization=quantization, trust_remote_code=trust)
        location = locate(model)
        refuse_reward_model(location, path)
        own = DEFAULT_RANK if location.adapter_folder is None else adapter_rank(location)
        return cls(model, precision or location.precision, max_rank(rank or own))

    def written(self, folder: Path) -> Path:
        """The folder to serve; a base that must be written is, below `folder`, under a name for each base."""
        reference = locate(self.model, self.precision).reference
        name = f"{reference.fingerprint[:12]}-{reference.quantization or 'plain'}-{self.precision}"
        return served_base(self.model, folder / name, self.precision)

    def settings(
        self, python: Path, port: int, temperature: float, max_length: int | None, arguments: Sequence[str]
    ) -> ServerSettings:
        """Settings of a server for runs that sample at a temperature."""
        return ServerSettings(
            python=python,
            precision=self.precision,
            max_rank=self.max_rank,
            processed_logprobs=temperature != 1,
            max_length=max_length,
            on_gpu=torch.cuda.is_available(),
            port=port,
            arguments=arguments,
        )
