"""The values a config file is made of. Importing them costs pydantic and nothing else."""

from tuner.config.data import Chat, Preferences, Source, Split, Text
from tuner.config.load import differences, from_json, leaves, load_config, override, to_json
from tuner.config.loss import FocalRanking
from tuner.config.model import Freeze, LoRA, Model, Rope
from tuner.config.stages import DPO, SFT, ModelStage, PackedStage, RewardModel, Stage
from tuner.config.training import (
    AdamW,
    Checkpoint,
    Constant,
    Cosine,
    Evaluation,
    Linear,
    PairEvaluation,
    Validation,
    Wandb,
)

__all__ = [
    "DPO",
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
    "Model",
    "ModelStage",
    "PackedStage",
    "PairEvaluation",
    "Preferences",
    "RewardModel",
    "Rope",
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
