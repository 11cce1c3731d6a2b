"""How a stage learns, looks and saves: optimiser, schedule, evaluation, checkpoints, tracking."""

from typing import Annotated, Literal

from pydantic import Field

from tuner.config.part import Function, Part


class AdamW(Part):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running square of the gradient."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the running square."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Share of a matrix taken off per unit of learning rate; vectors (norms, biases) are never decayed."""

    bits: Literal[32, 8] = 32
    """Precision of the optimiser's state; 8 is block-wise quantised by bitsandbytes."""

    paged: bool = False
    """Let the state move to host memory when the GPU's is short (bitsandbytes; no effect on CPU; a run that goes
    on holds it in the GPU's again)."""


class _Schedule(Part):
    warmup: float = Field(default=0.03, ge=0)
    """Steps of linear warm-up: a share of all steps below 1, a number of steps from 1 on."""

    warmup_start: float = Field(default=0.0, ge=0, le=1)
    """Learning rate before the first step, over the peak."""


class Cosine(_Schedule):
    """Warm-up, then half a cosine from the peak to `final`."""

    kind: Literal["cosine"] = "cosine"
    """Which schedule this is, in JSON."""

    final: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the last step, over the peak."""


class Linear(_Schedule):
    """Warm-up, then a straight line from the peak to `final`."""

    kind: Literal["linear"] = "linear"
    """Which schedule this is, in JSON."""

    final: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the last step, over the peak."""


class Constant(_Schedule):
    """Warm-up, then the peak."""

    kind: Literal["constant"] = "constant"
    """Which schedule this is, in JSON."""


Schedule = Annotated[Cosine | Linear | Constant, Field(discriminator="kind")]


class Measuring(Part):
    """When held-out rows are measured, and how many."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two measurements during training; None: ten over the run."""

    rows: int | None = Field(default=None, ge=1)
    """Measure at most so many held-out rows of a kind; None: all."""


class Validation(Measuring):
    """When held-out rows are measured, and what follows from their loss."""

    patience: int | None = Field(default=None, ge=1)
    """Stop after so many measurements in a row without a better validation loss; None: never."""

    keep_best: bool = False
    """Keep the checkpoint with the best validation loss, and make it the model of the run."""


class Evaluation(Validation):
    """What is measured on held-out conversations or texts."""

    samples: int = Field(default=3, ge=0)
    """Prompts of the validation rows answered at each measurement, to be looked at."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Longest answer sampled or scored, in tokens."""

    score: Literal["exact"] | Function | None = None
    """How answers to the test rows are scored before and after: "exact" (equal text), or a function
    (answer, reference) -> float in 0..1; None: the test rows' loss only."""


class PairEvaluation(Validation):
    """What is measured on held-out preferences: the loss, and the report card at the end."""

    worst: int = Field(default=20, ge=0)
    """Pairs shown in the report card that the model has most wrong."""


class Checkpoint(Part):
    """When the run is saved, so that it can go on bit for bit."""

    every: int | None = Field(default=200, ge=1)
    """Steps between two checkpoints; None: only at the end and when interrupted."""

    keep: int = Field(default=2, ge=1)
    """How many of the newest are kept, beside the best."""


class Wandb(Part):
    """Weights & Biases; without a key the run is logged offline."""

    project: str = "tuner"
    """Project the run belongs to."""

    entity: str | None = None
    """Team or user; None: the account's default."""

    group: str | None = None
    """Runs shown together."""

    tags: tuple[str, ...] = ()
    """Labels to filter by."""

    notes: str | None = None
    """A text for people."""

    mode: Literal["auto", "online", "offline"] = "auto"
    """"auto" is online with a key and offline without."""

    x_axis: Literal["step", "tokens"] = "step"
    """What the charts run along: optimiser steps, or trained tokens."""
