"""Nothing outside a stage's folder asks which stage it is, and a run imports its own stage alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.config.registry import config_class, stage_names
from tuner.config.serialization import field_paths
from tuner.stages.registry import stage_of

TUNER = Path(__file__).parents[2] / "tuner"
STAGE_FOLDERS = ("sft", "reward", "dpo", "kto", "rl", "cool")
CONFIGS = (
    "SFT",
    "RewardModel",
    "DPO",
    "KTO",
    "PPO",
    "GRPO",
    "RLOO",
    "COOL",
    "PackedConfig",
    "SingleModelConfig",
    "PolicyConfig",
)
PARTS_ONLY = ("training", "models", "evaluation", "feedback", "rollout", "losses", "data", "display")
"""Packages that take parts of a config, never a stage's."""


def sources(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((TUNER / folder).rglob("*.py"))]


def is_outside_stages(file: Path) -> bool:
    parts = file.relative_to(TUNER).parts
    in_a_stage = parts[0] == "stages" and parts[1] in STAGE_FOLDERS
    return not in_a_stage and parts[0] not in ("config", "algorithms")


def test_nobody_asks_which_stage_it_is() -> None:
    pattern = re.compile(rf"(isinstance|issubclass)\(.*\b({'|'.join(CONFIGS)})\b")
    asking = [
        f"{file}:{number}"
        for file in sources(".")
        if is_outside_stages(file)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
        or re.search(r"config\.stage\s*(==|in\b|!=)|type\(config\) (is|==|in)\b", line)
    ]
    assert not asking


@pytest.mark.parametrize("folder", PARTS_ONLY)
def test_what_is_below_the_stages_takes_parts(folder: str) -> None:
    """Imports of stage configs, found in the syntax tree."""
    importing = [
        f"{file.name}: {alias.name}"
        for file in sources(folder)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tuner.config")
        for alias in node.names
        if alias.name in CONFIGS
    ]
    assert not importing


@pytest.mark.parametrize("name", stage_names())
def test_every_stage_has_one_object(name: str) -> None:
    policy = config_class("ppo").model_construct(stage="ppo", reward=None)
    config = config_class(name).model_construct(stage=name, reward=None, policy=policy)
    stage, paths = stage_of(config), set(field_paths(config_class(name)))
    assert stage.figures(config).figures
    assert {stage.rows_field, *stage.example_rows, *stage.memory_fields} <= paths


SFT_RUN = """
import sys, tuner
from tuner.config import load_config, override
config = override(load_config("quickstart_sft"), {"max_steps": 1, "data.limit": 40, "evaluation.rows": 4})
tuner.train(config, runs=sys.argv[1])
foreign = ("config.ppo", "config.grpo", "config.rloo", "config.policy", "config.reward_config", "stages.reward",
           "stages.rl", "stages.dpo", "stages.kto", "rollout", "algorithms",
           "models.scorer", "models.reward", "losses.policy",
           "losses.reward", "evaluation.judge", "evaluation.report_card", "evaluation.win")
loaded = [name for name in sys.modules if name.removeprefix("tuner.").startswith(foreign) and name.startswith("tuner.")]
sys.exit(", ".join(loaded) or 0)
"""


def test_an_sft_run_imports_no_other_stage(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SFT_RUN, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
