"""Optimizer, learning rate schedule, checkpoints, and experiment tracking."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tuner.config.base import FOLDER_NAME, ConfigBase

Recomputation = bool | Literal["selective", "offload"]
"""What layers compute again in the backward pass; see `gradient_checkpointing`."""
KernelName = Literal["compile", "liger", "lora"]
"""What can take the place of parts of a model; see `kernels`."""
EXCLUDED_BY: dict[KernelName, KernelName] = {"liger": "compile", "lora": "compile"}
"""Kernel -> the one beside which it is not installed, as that does its work or cannot take it in."""
Kernels = Literal["plain", "auto"] | tuple[KernelName, ...]
"""Which of them do."""


class AdamW(ConfigBase):
    """Adam with decoupled weight decay (AdamW, arXiv 1711.05101)."""

    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square, each from 0 to below 1."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator for numerical stability."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay coefficient, applied to matrices only: vectors (norms, biases) are never decayed."""

    bits: Literal[32, 8] = 32
    """Precision of the optimizer state; 8: block-wise quantized by bitsandbytes."""

    paged: bool = False
    """Page optimizer state to host memory when GPU memory runs out (bitsandbytes; no effect on CPU). After resuming,
    it stays in GPU memory. bitsandbytes has no way to free it: that of several runs in one process, as of the rounds of
    a COOL run, adds up until the process ends."""


class _WarmupSchedule(ConfigBase):
    warmup: float | int = Field(default=0.03, ge=0)
    """Linear warm-up: a fraction of all steps if below 1 (0.03: 3%, rounded to whole steps, so none of 10), or a number
    of steps, as in 1 or 200; at most all steps but one. The last warm-up step is at the peak. 1.0 is refused: it could
    mean one step or all."""

    warmup_start: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the peak that warm-up rises from; its first step is already one part above it: of n warm-up steps,
    step i is at warmup_start + (1 - warmup_start) * i / n."""

    @field_validator("warmup")
    @classmethod
    def _is_a_fraction_or_whole_steps(cls, warmup: float | int) -> float | int:
        if isinstance(warmup, float) and warmup == 1.0:
            raise ValueError(
                "1.0 could mean one step or all steps: write 1 for one step, or a fraction below 1, such as 0.99"
            )
        if warmup > 1 and warmup != int(warmup):
            raise ValueError(
                f"from 1 on it is a number of steps, and {warmup} is not whole: write {round(warmup)}, or a fraction "
                "below 1"
            )
        return warmup


class Cosine(_WarmupSchedule):
    """Linear warm-up, then cosine decay from the peak towards `final`."""

    kind: Literal["cosine"] = "cosine"
    """Kind of schedule, in JSON."""

    final: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the peak that the decay would reach one step after the last, so that no step is wasted at 0. Of n
    steps after warm-up, the last is at final + (1 - final) * (1 - cos(pi / n)) / 2: with final=0.15 and n=10 at
    0.171."""


class Linear(_WarmupSchedule):
    """Linear warm-up, then linear decay from the peak towards `final`."""

    kind: Literal["linear"] = "linear"
    """Kind of schedule, in JSON."""

    final: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the peak that the decay would reach one step after the last, so that no step is wasted at 0. Of n
    steps after warm-up, the last is at final + (1 - final) * 1 / n: with final=0.15 and n=10 at 0.235."""


class Constant(_WarmupSchedule):
    """Linear warm-up, then a constant learning rate."""

    kind: Literal["constant"] = "constant"
    """Kind of schedule, in JSON."""


Schedule = Annotated[Cosine | Linear | Constant, Field(discriminator="kind")]


class Checkpoint(ConfigBase):
    """Checkpoints, from which an interrupted run resumes."""

    every: int | None = Field(default=200, ge=1)
    """Steps between checkpoints; None: only at the end and on interruption."""

    keep: int = Field(default=2, ge=1)
    """Number of recent checkpoints to keep, in addition to the best."""

    skip_damaged: bool = False
    """Where the newest checkpoint is not as it was written, set it aside and resume from the one before; false: stop
    with an error that names it."""

    milestones: dict[Annotated[str, Field(pattern=FOLDER_NAME)], Annotated[float | int, Field(gt=0)]] = Field(
        default_factory=dict
    )
    """Name -> after which step the model of that time is kept, in the folder milestones/NAME of the run: a fraction of
    all steps if below 1, or a number of steps. {"early": 0.25, "middle": 0.5} keeps two. Such a folder is a model for
    every command and config, and stays when checkpoints go."""

    @field_validator("milestones")
    @classmethod
    def _are_fractions_or_whole_steps(cls, milestones: dict[str, float | int]) -> dict[str, float | int]:
        for name, when in milestones.items():
            if when >= 1 and not isinstance(when, int):
                raise ValueError(f"{name}: {when} is neither a fraction below 1 nor a whole number of steps")
        return milestones

    def milestone_steps(self, total_steps: int) -> dict[str, int]:
        """Name -> number of steps after which the model is kept, in a run of so many steps."""
        return {
            name: when if isinstance(when, int) else max(1, round(when * total_steps))
            for name, when in self.milestones.items()
        }


class Wandb(ConfigBase):
    """Weights & Biases logging."""

    project: str = "tuner"
    """Project name."""

    entity: str | None = None
    """Team or user name; None: the account's default."""

    group: str | None = None
    """Name of the group the run belongs to; None: in a run of rounds, the name of that run."""

    job_type: str | None = None
    """What the run is within its group, such as "train"; a run of rounds is "rounds", and the runs within it are
    "round_1.reward", "round_1.ppo", and so on."""

    tags: tuple[str, ...] = ()
    """Tags to filter runs by."""

    notes: str | None = None
    """Description of the run."""

    mode: Literal["auto", "online", "offline"] = "auto"
    """"auto": online if an API key is configured, otherwise offline."""

    x_axis: Literal["step", "tokens"] = "step"
    """X-axis of the charts: training steps, or trained tokens."""
