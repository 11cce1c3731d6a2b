"""Engines that answer prompts in place of the model in training."""

from typing import Annotated, Literal

from pydantic import Field

from tuner.config.base import ConfigBase, PathText


class VLLM(ConfigBase):
    """Answers from a vLLM server: token ids in, token ids and log-probabilities out.

    An adapter reaches the server by runtime loading, full weights by a folder and a restart.
    """

    url: Annotated[str, Field(pattern=r"^https?://[^/\s]+/*$")] | None = None
    """Address of a server that `tuner serve-rollouts` has started, as http://127.0.0.1:8000; it must see the run's
    folder. None: the run starts a server of its own, and ends it. A key in $VLLM_API_KEY is sent along."""

    python: PathText | None = None
    """The python of vLLM's own environment; None: $TUNER_VLLM_PYTHON, or .venv-vllm/bin/python (`make vllm`).
    Only for a server of the run's own."""

    arguments: tuple[str, ...] = ()
    """Further arguments of a server of the run's own, such as "--gpu-memory-utilization=0.4": without that, a server on
    the GPU that trains takes half of the memory that is free when it starts."""

    concurrency: int = Field(default=128, ge=1)
    """Prompts that the server is sent at the same time."""

    timeout: float = Field(default=600.0, gt=0)
    """Seconds to wait for an answer before it is requested again."""

    retries: int = Field(default=5, ge=0)
    """Failures in a row, without any answer between them, after which the run ends: time-outs, lost connections, and
    deaths of a server of its own. That is started again when it dies, and after the second failure."""

    patience: float = Field(default=600.0, gt=0)
    """Seconds to wait for a server that starts, or that is away, before the run ends."""

    max_gap: float = Field(default=0.05, ge=0)
    """Mean absolute difference between the server's and the trainer's log-probabilities of a step's answers, in nats
    per token, above which `above_max_gap` acts. In bf16 it is a few hundredths."""

    above_max_gap: Literal["truncate", "stop"] = "truncate"
    """"truncate": the step's policy loss is weighted by truncated importance weights (Yao et al., 2025); "stop": the
    run ends before the step's update, in a sentence."""

    max_weight: float = Field(default=2.0, ge=1)
    """Largest importance weight of "truncate": min(exp(trainer's − server's log-probability), this), of each token, or
    in RLOO of each answer."""


Engine = Literal["local"] | VLLM
"""What answers prompts: "local", the model in training; or a vLLM server."""
