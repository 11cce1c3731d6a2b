"""What stages have in common: every one, those that train one model, and those that train it on packed rows."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.adapter import Adapter
from tuner.config.base import ConfigBase
from tuner.config.data import Data
from tuner.config.evaluation import Validation
from tuner.config.model import Freeze, Model
from tuner.config.training import AdamW, Checkpoint, Cosine, Schedule, Wandb


class StageConfig(ConfigBase):
    """What belongs to every stage.

    A stage's config class has a field `stage`, a literal that names it in JSON.
    """

    implementation: ClassVar[str]
    """Module whose `STAGE` runs configs of this class; imported when one runs, never by loading a config."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder below --runs; None: the config file's name."""

    epochs: float = Field(default=1.0, gt=0)
    """How often every row is seen."""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps (of the optimiser; of PPO: rollouts with their updates), the schedule with them; None:
    when the epochs are over."""

    optimizer: AdamW = AdamW()
    """How weights follow their gradients."""

    schedule: Schedule = Cosine()
    """How the learning rate moves over the run."""

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Longer gradients (L2 over all trained weights) are scaled to this; None: never."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """What matrix products are computed in; trained weights and the optimiser stay in fp32."""

    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: about a third more time, far less memory, the same result."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; "auto" takes the GPU when there is one."""

    deterministic: bool = False
    """On CUDA: resume bit for bit, at some cost in speed. CPU runs always do."""

    seed: int = Field(default=0, ge=0)
    """Order of the data, fresh weights, dropout, noise of answers."""

    checkpoint: Checkpoint = Checkpoint()
    """When the run is saved."""

    tracking: Wandb | None = None
    """Weights & Biases; None: files only."""


class SingleModelConfig(StageConfig):
    """A stage that trains one model."""

    model: Model
    """What training starts from."""

    adapter: Adapter | None = None
    """Train an adapter instead of the weights themselves. A model that is a run with an adapter continues it."""

    @model_validator(mode="after")
    def _quantised_weights_are_not_trained(self) -> Self:
        if self.model.quantization and self.adapter is None:
            raise ValueError(
                f"model.quantization={self.model.quantization!r} can only train an adapter: "
                "add adapter=LoRA(), or leave quantization out"
            )
        return self


class PackedConfig(SingleModelConfig):
    """A stage that trains one model on packed rows, with a loop of ours."""

    data: Data
    """What is learned from."""

    freeze: Freeze | None = None
    """Which weights stay as they are; None: all that can be trained are."""

    tokens_per_step: int = Field(default=32_768, ge=1)
    """What an optimiser step learns from, over all devices, in tokens."""

    tokens_per_pass: int = Field(default=2_048, ge=1)
    """What one forward and backward pass holds, in tokens: memory and speed, never the result."""

    max_bad_steps: int = Field(default=3, ge=1)
    """Steps with a loss or gradient that is not finite are skipped; after so many in a row training stops."""

    evaluation: Validation = Validation()
    """What is measured on held-out rows."""

    @model_validator(mode="after")
    def _a_pass_fits_a_step(self) -> Self:
        if self.tokens_per_pass > self.tokens_per_step:
            raise ValueError(
                f"tokens_per_pass ({self.tokens_per_pass}) is more than tokens_per_step "
                f"({self.tokens_per_step}): lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _best_needs_validation(self) -> Self:
        held_out = self.data.split.validation or self.data.validation_files
        if (self.evaluation.keep_best or self.evaluation.patience) and not held_out:
            raise ValueError(
                "evaluation.keep_best and evaluation.patience need validation rows: "
                "add data.split=Split(validation=0.02) or data.validation_files"
            )
        return self
