"""The values a config file is made of. Importing them costs pydantic and nothing else."""

from tuner.config.data import Chat, Preferences, Prompts, Source, Split, Text
from tuner.config.load import differences, from_json, leaves, load_config, override, to_json
from tuner.config.loss import FocalRanking
from tuner.config.model import Freeze, LoRA, Model, Rope
from tuner.config.rollout import PolicyEvaluation, Replay, Sampling
from tuner.config.stage import ModelStage, PackedStage, Stage
from tuner.config.stages import DPO, PPO, SFT, RewardModel
from tuner.config.training import (
    AdamW,
    Checkpoint,
    Constant,
    Cosine,
    Evaluation,
    Linear,
    Measuring,
    PairEvaluation,
    Validation,
    Wandb,
)

__all__ = [
    "DPO",
    "PPO",
    "SFT",
    "AdamW",
    "Chat",
    "Checkpoint",
    "Constant",
    "Cosine",
    "Evaluation",
    "FocalRanking",
    "Freeze",
    "Linear",
    "LoRA",
    "Measuring",
    "Model",
    "ModelStage",
    "PackedStage",
    "PairEvaluation",
    "PolicyEvaluation",
    "Preferences",
    "Prompts",
    "Replay",
    "RewardModel",
    "Rope",
    "Sampling",
    "Source",
    "Split",
    "Stage",
    "Text",
    "Validation",
    "Wandb",
    "differences",
    "from_json",
    "leaves",
    "load_config",
    "override",
    "to_json",
]
