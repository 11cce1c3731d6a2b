"""The values a config file is made of. Importing them costs pydantic and nothing else."""

from tuner.config.data import Chat, Source, Split, Text
from tuner.config.load import differences, from_json, leaves, load_config, override, to_json
from tuner.config.model import Freeze, LoRA, Model, Rope
from tuner.config.stages import SFT, Stage
from tuner.config.training import AdamW, Checkpoint, Constant, Cosine, Evaluation, Linear, Wandb

__all__ = [
    "SFT",
    "AdamW",
    "Chat",
    "Checkpoint",
    "Constant",
    "Cosine",
    "Evaluation",
    "Freeze",
    "Linear",
    "LoRA",
    "Model",
    "Rope",
    "Source",
    "Split",
    "Stage",
    "Text",
    "Wandb",
    "differences",
    "from_json",
    "leaves",
    "load_config",
    "override",
    "to_json",
]
