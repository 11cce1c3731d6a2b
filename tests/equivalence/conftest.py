"""A small run on the embedded model, and ways to compare two of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner.config import SFT, AdamW, Chat, Evaluation, LoRA, Model, override
from tuner.training.run import Run

SMALL = SFT(
    name="small",
    model=Model(path="tuner:tiny"),
    adapter=LoRA(r=8, alpha=16),
    data=Chat(files=("tuner:sums/train.jsonl",), template="internlm2", max_length=64, limit=200),
    optimizer=AdamW(
        lr=5e-3, eps=1e-4
    ),  # a larger eps, or Adam makes a step of every rounding of a zero gradient
    tokens_per_step=512,
    tokens_per_pass=512,
    max_steps=5,
    precision="fp32",
    gradient_checkpointing=False,
    evaluation=Evaluation(samples=0),
)


@pytest.fixture
def small() -> Callable[..., SFT]:
    """The small config with some leaves changed: small({"max_steps": 3})."""
    return lambda changes=None: override(SMALL, changes or {})


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Run]:
    """Train a config in a folder of its own: train(config, "one")."""

    def trained(config: SFT, place: str = "runs") -> Run:
        import tuner

        return tuner.train(config, runs=tmp_path / place)

    return trained


def curve(run: Run) -> list[tuple[Any, ...]]:
    """What a run's steps were, to the last bit; without times."""
    return [(record["step"], record["tokens"], record["loss"], record["grad_norm"]) for record in run.metrics]


def weights(run: Run) -> dict[str, Any]:
    """The trained model's tensors."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(run.model_folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
