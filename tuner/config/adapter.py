"""Adapters: small sets of weights trained while the model's own stay frozen."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tuner.config.base import ConfigBase


class LoRA(ConfigBase):
    """Low-rank adaptation (LoRA, arXiv 2106.09685): B·A·alpha/r is added to frozen linear layers; A and B in fp32."""

    r: int = Field(default=64, ge=1, le=65_536)
    """Rank of the adapter matrices."""

    alpha: float = Field(default=16, gt=0)
    """Scaling numerator: the low-rank update is multiplied by alpha / r."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the adapter's input during training, from 0 to below 1."""

    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Modules that get an adapter: every linear layer except the output head, or suffixes of module names, such as
    ("q_proj", "v_proj")."""

    target_parameters: tuple[str, ...] = ()
    """Suffixes of further parameters that get an adapter, which are in no linear layer: the fused experts of a mixture,
    such as ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"). Needs dropout=0."""

    train_whole: tuple[str, ...] = ()
    """Modules trained in full alongside the adapters, such as ("embed_tokens", "lm_head")."""

    @model_validator(mode="after")
    def _parameters_have_no_dropout(self) -> Self:
        if self.target_parameters and self.dropout:
            raise ValueError(
                "an adapter of target_parameters is added to the weights and has no input to drop: write dropout=0"
            )
        return self


Adapter = LoRA
"""Type of the `adapter` fields. A second kind would make it a union, with an entry in `models/adapter_kinds.py`."""
