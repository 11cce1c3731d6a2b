"""Adapters: the few weights trained in place of a model's own."""

from typing import Literal

from pydantic import Field

from tuner.config.base import ConfigBase


class LoRA(ConfigBase):
    """Low-rank adapters (Hu et al., 2021): weights B·A·alpha/r beside frozen linear layers, in fp32."""

    r: int = Field(default=64, ge=1)
    """Rank of the two factors."""

    alpha: float = Field(default=16, gt=0)
    """Scale: the product is multiplied by alpha / r."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs dropped while training."""

    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: all linear ones but the head, or module name endings such as ("q_proj",)."""

    train_whole: tuple[str, ...] = ()
    """Modules trained in full beside the adapters, such as ("embed_tokens", "lm_head")."""


Adapter = LoRA
"""Every kind of adapter, a union once there is a second one; `models/adapters.py` has an entry for each."""
