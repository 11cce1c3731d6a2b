"""The stages: each config file holds one of these values, named `config`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tuner.config.data import Chat, Text
from tuner.config.model import Freeze, LoRA, Model
from tuner.config.part import Part
from tuner.config.training import AdamW, Checkpoint, Cosine, Evaluation, Schedule, Wandb


class Stage(Part):
    """What belongs to every stage."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder below --runs; None: the config file's name."""

    tokens_per_step: int = Field(default=32_768, ge=1)
    """What an optimiser step learns from, over all devices, in tokens."""

    tokens_per_pass: int = Field(default=2_048, ge=1)
    """What one forward and backward pass holds, in tokens: memory and speed, never the result."""

    epochs: float = Field(default=1.0, gt=0)
    """How often every row is seen."""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimiser steps, the schedule with them; None: when the epochs are over."""

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
    """Order of the data, fresh weights, dropout."""

    max_bad_steps: int = Field(default=3, ge=1)
    """Steps with a loss or gradient that is not finite are skipped; after so many in a row training stops."""

    evaluation: Evaluation = Evaluation()
    """What is measured on held-out rows."""

    checkpoint: Checkpoint = Checkpoint()
    """When the run is saved."""

    tracking: Wandb | None = None
    """Weights & Biases; None: files only."""

    @model_validator(mode="after")
    def _a_pass_fits_a_step(self) -> Self:
        if self.tokens_per_pass > self.tokens_per_step:
            raise ValueError(
                f"tokens_per_pass ({self.tokens_per_pass}) is more than tokens_per_step "
                f"({self.tokens_per_step}): lower the first or raise the second"
            )
        return self


class SFT(Stage):
    """Supervised fine-tuning, or continued pre-training: full, LoRA or QLoRA."""

    stage: Literal["sft"] = "sft"
    """Which stage this is, in JSON."""

    model: Model
    """What training starts from."""

    adapter: LoRA | None = None
    """Train an adapter instead of the weights themselves. A model that is a run with an adapter continues it."""

    freeze: Freeze | None = None
    """Which weights stay as they are; None: all that can be trained are."""

    data: Annotated[Chat | Text, Field(discriminator="kind")]
    """What is learned from."""

    @model_validator(mode="after")
    def _a_sample_fits_a_pass(self) -> Self:
        if self.data.max_length > self.tokens_per_pass:
            raise ValueError(
                f"data.max_length ({self.data.max_length}) is more than tokens_per_pass "
                f"({self.tokens_per_pass}): a sample is never cut to fit; lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _quantised_weights_are_not_trained(self) -> Self:
        if self.model.quantization and self.adapter is None:
            raise ValueError(
                f"model.quantization={self.model.quantization!r} can only train an adapter: "
                "add adapter=LoRA(), or leave quantization out"
            )
        return self

    @model_validator(mode="after")
    def _a_score_needs_answers(self) -> Self:
        if self.evaluation.score is None:
            return self
        if not (self.data.split.test or self.data.test_files):
            raise ValueError(
                "evaluation.score needs test rows: add data.test_files or data.split=Split(test=0.02)"
            )
        if self.data.kind == "text" or self.data.learn == "all":
            raise ValueError("evaluation.score compares answers: learn assistant turns, or leave score out")
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


STAGES: dict[str, type[Stage]] = {"sft": SFT}
"""Stage by the name it has in JSON."""
