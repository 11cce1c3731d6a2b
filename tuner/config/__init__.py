"""The classes a config file is built from. They are imported lazily: loading one stage's config imports no other's."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.config.adapter import Adapter, LoRA
    from tuner.config.alarms import Alarms
    from tuner.config.config_file import load_config
    from tuner.config.cool_config import COOL, Candidates, Patch, Round
    from tuner.config.data import Chat, Preferences, Prompts, Replay, ShortRows, Source, Split, Text
    from tuner.config.dpo_config import DPO
    from tuner.config.engine_config import VLLM
    from tuner.config.evaluation import (
        Evaluation,
        HeldOutEvaluation,
        PairEvaluation,
        PolicyEvaluation,
        Validation,
    )
    from tuner.config.feedback_config import Feedback, Judge, People, RuleFeedback
    from tuner.config.grpo_config import GRPO
    from tuner.config.kto_config import KTO
    from tuner.config.model import Freeze, Model, Rope
    from tuner.config.overrides import override
    from tuner.config.parallel import Parallel
    from tuner.config.policy_config import AdaptiveKL, PolicyConfig
    from tuner.config.policy_rewards import LengthPenalty, PreferenceReward, Rule
    from tuner.config.ppo_config import PPO
    from tuner.config.ranking import FocalRanking
    from tuner.config.registry import config_class, register_stage, stage_names
    from tuner.config.reward_config import RewardModel
    from tuner.config.rloo_config import RLOO
    from tuner.config.sampling import Sampling
    from tuner.config.serialization import differences, from_json, leaves, to_json
    from tuner.config.sft_config import SFT
    from tuner.config.stage_config import PackedConfig, SingleModelConfig, StageConfig, TrainingConfig
    from tuner.config.training import AdamW, Checkpoint, Constant, Cosine, Linear, Wandb

_NAMES_BY_MODULE = {
    "adapter": ("Adapter", "LoRA"),
    "alarms": ("Alarms",),
    "config_file": ("load_config",),
    "cool_config": ("COOL", "Candidates", "Patch", "Round"),
    "data": (
        "Chat",
        "Preferences",
        "Prompts",
        "Replay",
        "ShortRows",
        "Source",
        "Split",
        "Text",
    ),
    "dpo_config": ("DPO",),
    "engine_config": ("VLLM",),
    "evaluation": (
        "Evaluation",
        "HeldOutEvaluation",
        "PairEvaluation",
        "PolicyEvaluation",
        "Validation",
    ),
    "feedback_config": (
        "Feedback",
        "Judge",
        "People",
        "RuleFeedback",
    ),
    "grpo_config": ("GRPO",),
    "kto_config": ("KTO",),
    "model": (
        "Freeze",
        "Model",
        "Rope",
    ),
    "overrides": ("override",),
    "parallel": ("Parallel",),
    "policy_config": (
        "AdaptiveKL",
        "PolicyConfig",
    ),
    "policy_rewards": (
        "LengthPenalty",
        "PreferenceReward",
        "Rule",
    ),
    "ppo_config": ("PPO",),
    "ranking": ("FocalRanking",),
    "registry": (
        "config_class",
        "register_stage",
        "stage_names",
    ),
    "reward_config": ("RewardModel",),
    "rloo_config": ("RLOO",),
    "sampling": ("Sampling",),
    "serialization": (
        "differences",
        "from_json",
        "leaves",
        "to_json",
    ),
    "sft_config": ("SFT",),
    "stage_config": (
        "PackedConfig",
        "SingleModelConfig",
        "StageConfig",
        "TrainingConfig",
    ),
    "training": (
        "AdamW",
        "Checkpoint",
        "Constant",
        "Cosine",
        "Linear",
        "Wandb",
    ),
}
"""Module of tuner.config -> the public names it defines."""
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = [
    "COOL",
    "DPO",
    "GRPO",
    "KTO",
    "PPO",
    "RLOO",
    "SFT",
    "VLLM",
    "AdamW",
    "Adapter",
    "AdaptiveKL",
    "Alarms",
    "Candidates",
    "Chat",
    "Checkpoint",
    "Constant",
    "Cosine",
    "Evaluation",
    "Feedback",
    "FocalRanking",
    "Freeze",
    "HeldOutEvaluation",
    "Judge",
    "LengthPenalty",
    "Linear",
    "LoRA",
    "Model",
    "PackedConfig",
    "PairEvaluation",
    "Parallel",
    "Patch",
    "People",
    "PolicyConfig",
    "PolicyEvaluation",
    "PreferenceReward",
    "Preferences",
    "Prompts",
    "Replay",
    "RewardModel",
    "Rope",
    "Round",
    "Rule",
    "RuleFeedback",
    "Sampling",
    "ShortRows",
    "SingleModelConfig",
    "Source",
    "Split",
    "StageConfig",
    "Text",
    "TrainingConfig",
    "Validation",
    "Wandb",
    "config_class",
    "differences",
    "from_json",
    "leaves",
    "load_config",
    "override",
    "register_stage",
    "stage_names",
    "to_json",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tuner.config' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tuner.config.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """All public names, those not imported yet too."""
    return sorted(__all__)
