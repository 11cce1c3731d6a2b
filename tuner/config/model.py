"""The model to train, and which of its weights."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tuner.config.base import ConfigBase, PathText
from tuner.errors import MissingError
from tuner.resources import locate


class Rope(ConfigBase):
    """Rotary position embeddings beyond the checkpoint's trained context length; applied and saved by every stage."""

    base: float | None = Field(default=None, gt=0)
    """Base of the rotary frequencies (theta); None: the checkpoint's. InternLM2 uses 1e6."""

    scaling: Literal["linear", "dynamic", "yarn", "longrope"] | None = None
    """Method of scaling positions beyond the trained context length; None: the checkpoint's. InternLM2's original code
    reads only "linear" and "dynamic"."""

    factor: float | None = Field(default=None, gt=1.0)
    """Target context length divided by the trained one; with `scaling`, either this or `length` is required."""

    length: int | None = Field(default=None, ge=2)
    """Target context length, in tokens: instead of `factor`, or with a `base` alone."""

    long_factors: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """LongRoPE: the number by which each rotary frequency is divided, half a head's size of them, from the fastest on;
    required with scaling="longrope"."""

    mixed_window: bool = False
    """Keep the checkpoint's own frequencies for rows within its trained length, and take the new ones for longer rows
    only (LongRoPE2, arXiv 2502.20082). Saved as a LongRoPE configuration."""

    @model_validator(mode="after")
    def _scaling_has_a_target(self) -> Self:
        if self.scaling is None and self.factor is not None:
            raise ValueError(
                "factor has no effect without scaling: write scaling and factor together, as in "
                'Rope(scaling="dynamic", factor=2.0)'
            )
        if self.scaling is not None and (self.factor is None) == (self.length is None):
            raise ValueError(
                "write scaling and factor together, or scaling and length, as in "
                'Rope(scaling="dynamic", factor=2.0)'
            )
        if self.length is not None and self.scaling is None and self.base is None:
            raise ValueError(
                "length needs to know how it is reached: write a new base, or scaling, beside it"
            )
        return self

    @model_validator(mode="after")
    def _long_factors_are_of_longrope(self) -> Self:
        if (self.scaling == "longrope") != (self.long_factors is not None):
            raise ValueError(
                'scaling="longrope" needs long_factors, which only it reads: write both, or another scaling'
            )
        return self

    @model_validator(mode="after")
    def _a_window_has_two_sides(self) -> Self:
        if self.mixed_window and self.scaling == "dynamic":
            raise ValueError("dynamic scaling keeps short rows as they were: leave mixed_window out")
        if self.mixed_window and self.scaling is None and self.length is None:
            raise ValueError(
                "mixed_window needs a target for long rows: write scaling, or base and length, beside it"
            )
        return self


MODELSCOPE = "modelscope://"
"""Prefix of the names of models on ModelScope."""
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def refuse_missing_model(path: str) -> None:
    """Raise MissingError for the path of a model that is not here and cannot be a name on the hub."""
    if Path(locate(path)).exists():
        return
    if path.startswith(MODELSCOPE) and _HUB_NAME.match(path.removeprefix(MODELSCOPE)):
        return
    # `runs/NAME` looks like a hub name: a misspelled run must be an error here, and never a download
    if locate(path) != path or path.startswith((".", "/", "~", "runs/")) or not _HUB_NAME.match(path):
        raise MissingError(
            f"{path}: no such model folder; check the path, or train the run it belongs to first"
        )


class Model(ConfigBase):
    """A causal language model: from a hub, a model folder, a run folder, or `tuner:tiny`, the embedded model."""

    path: PathText = Field(min_length=1)
    """Hub name, `modelscope://owner/name`, model folder, run folder, or `tuner:tiny`. A run brings its own adapter and
    quantization."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    quantization: Literal["nf4", "int8"] | None = None
    """Quantization of the frozen base: 4-bit NormalFloat with double quantization, or 8-bit; None: not quantized."""

    rope: Rope | None = None
    """Long-context settings; None: the checkpoint's."""

    resize_embeddings: bool = False
    """Where the tokenizer has more tokens than the embedding has rows, add rows at the mean of the others. They are
    trained, beside an adapter too."""

    trust_remote_code: bool = False
    """Allow the checkpoint to run its own Python code. InternLM2 does not need this here."""


class Freeze(ConfigBase):
    """Weights to freeze, of the model or of its adapters."""

    all_but_last_layers: int | None = Field(default=None, ge=1)
    """Train only the last N layers, the final norm and the output head; layers below need no backward pass."""

    names: tuple[str, ...] = ()
    """Shell-style patterns of parameter names to freeze, such as ("model.embed_tokens.*", "*norm*")."""

    @model_validator(mode="after")
    def _freezes_something(self) -> Self:
        if self.all_but_last_layers is None and not self.names:
            raise ValueError(
                "this freezes nothing: write all_but_last_layers=8 or names=(...), or leave freeze out"
            )
        return self
