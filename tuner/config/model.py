"""Which model is trained, and which of its weights."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tuner.config.base import ConfigBase


class Rope(ConfigBase):
    """Rotary positions beyond what the checkpoint was trained for; applied and saved by every stage."""

    base: float | None = Field(default=None, gt=0)
    """Base of the rotary frequencies (theta); None keeps the checkpoint's. InternLM2 uses 1e6."""

    scaling: Literal["linear", "dynamic", "yarn"] | None = None
    """How positions past the trained length are squeezed; None keeps the checkpoint's. InternLM2's original code
    reads linear and dynamic only."""

    factor: float | None = Field(default=None, gt=1.0)
    """Length the model is to reach, over the length it was trained for; belongs to `scaling`."""

    @model_validator(mode="after")
    def _scaling_has_a_factor(self) -> Self:
        if (self.scaling is None) != (self.factor is None):
            raise ValueError('write scaling and factor together, as in Rope(scaling="dynamic", factor=2.0)')
        return self


class Model(ConfigBase):
    """A causal language model: a hub name, a folder, a run folder, or `tuner:tiny`, the embedded one."""

    path: str = Field(min_length=1)
    """Hub name, folder, run folder, or `tuner:tiny`. A run brings its own adapter and quantisation."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    quantization: Literal["nf4", "int8"] | None = None
    """Precision the frozen base is held in: 4-bit NormalFloat, double-quantised, or 8-bit; None: not quantised."""

    rope: Rope | None = None
    """Long-context settings; None keeps the checkpoint's."""

    trust_remote_code: bool = False
    """Let the checkpoint run Python code of its own. InternLM2 does not need it here."""


class Freeze(ConfigBase):
    """Which weights stay as they are, of the model or of its adapters."""

    all_but_last_layers: int | None = Field(default=None, ge=1)
    """Train the last so many layers and the final norm and head; what lies below costs no backward pass."""

    names: tuple[str, ...] = ()
    """Shell patterns over parameter names to freeze, such as ("model.embed_tokens.*", "*norm*")."""

    @model_validator(mode="after")
    def _freezes_something(self) -> Self:
        if self.all_but_last_layers is None and not self.names:
            raise ValueError(
                "freezes nothing: write all_but_last_layers=8 or names=(...), or leave freeze out"
            )
        return self
