"""Every stage as a small config, for tests that take minutes: `make soak`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence.conftest import SMALL, SMALL_REWARD, ppo, start
from tuner.config import DPO, GRPO, KTO, RLOO, LoRA, Model, Preferences, StageConfig, override
from tuner.resources import locate

__all__ = ["ppo", "start"]  # fixtures

STAGES = ("sft", "reward", "dpo", "kto", "ppo", "grpo", "rloo")
SHARED = (
    *("policy", "reward", "adapter", "prompts", "sampling", "replay"),
    *("precision", "gradient_checkpointing", "optimizer", "evaluation", "tokens_per_pass"),
)


def polite_pairs(folder: Path) -> Path:
    """Pairs of one condition: without conditions, which a policy is not given, those of others contradict them."""
    lines = Path(locate("tuner:twins/train.jsonl")).read_text(encoding="utf-8").splitlines()
    file = folder / "polite.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines if json.loads(line).get("condition") == "polite"))
    return file


def small_trl(kind: type[DPO] | type[KTO], pairs: Path, **sizes: int) -> DPO | KTO:
    return kind(
        name=kind.__name__.lower(),
        model=Model(path="tuner:tiny"),
        adapter=LoRA(r=4),
        data=Preferences(files=(str(pairs),), template="internlm2", max_length=128),
        precision="fp32",
        gradient_checkpointing=False,
        **sizes,  # pyright: ignore[reportArgumentType]
    )


@pytest.fixture
def stage_config(ppo, tmp_path) -> Callable[..., StageConfig]:
    """The small config of a stage, some leaves changed: stage_config("grpo", {"max_steps": 200})."""

    def config(stage: str, changes: dict[str, Any]) -> StageConfig:
        small: StageConfig
        if stage in ("grpo", "rloo"):
            kind = {"grpo": GRPO, "rloo": RLOO}[stage]
            fields = {name: getattr(ppo(), name) for name in SHARED}
            small = kind(name=stage, prompts_per_step=3, answers_per_prompt=3, **fields)
        elif stage == "dpo":
            small = small_trl(DPO, polite_pairs(tmp_path), pairs_per_step=4, pairs_per_pass=2)
        elif stage == "kto":
            small = small_trl(KTO, polite_pairs(tmp_path), answers_per_step=8, answers_per_pass=4)
        else:
            small = {"sft": SMALL, "reward": SMALL_REWARD, "ppo": ppo()}[stage]
        return override(small, {"epochs": 1000.0} | changes)

    return config
