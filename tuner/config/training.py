"""How a stage learns, looks and saves: optimiser, schedule, evaluation, checkpoints, tracking."""

from typing import Annotated, Literal

from pydantic import Field

from tuner.config.base import ConfigBase


class AdamW(ConfigBase):
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


class _Schedule(ConfigBase):
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


class Checkpoint(ConfigBase):
    """When the run is saved, so that it can go on bit for bit."""

    every: int | None = Field(default=200, ge=1)
    """Steps between two checkpoints; None: only at the end and when interrupted."""

    keep: int = Field(default=2, ge=1)
    """How many of the newest are kept, beside the best."""


class Wandb(ConfigBase):
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
