"""What a training loop takes from a stage's config, whichever stage it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from tuner.config.evaluation import HeldOutEvaluation
from tuner.config.stage_config import TrainingConfig
from tuner.config.training import AdamW, Checkpoint, Schedule


@dataclass(frozen=True)
class LoopSettings:
    """Parts of a stage's config, by the names they have there."""

    optimizer: AdamW
    schedule: Schedule
    checkpoint: Checkpoint
    evaluation: HeldOutEvaluation
    """When held-out rows are measured; a `Validation` also says what follows from their loss."""
    max_steps: int | None = None
    max_grad_norm: float | None = None
    """L2 norm that gradients are clipped to; None: no clipping."""
    max_bad_steps: int = 1
    """Number of consecutive steps with a non-finite loss or gradient at which training fails."""

    @classmethod
    def of(cls, config: TrainingConfig) -> Self:
        """The settings of any stage whose config has these fields; one without `max_bad_steps` skips no step."""
        stage: Any = config  # `evaluation` and `max_bad_steps` belong to some stages only
        return cls(
            optimizer=config.optimizer,
            schedule=config.schedule,
            checkpoint=config.checkpoint,
            evaluation=stage.evaluation,
            max_steps=config.max_steps,
            max_grad_norm=config.max_grad_norm,
            max_bad_steps=getattr(stage, "max_bad_steps", 1),
        )

    @property
    def best_by(self) -> str:
        """What the best weights are best in."""
        measure = getattr(self.evaluation, "keep_best", None)
        return {"gold": "held-out gold score", "score": "held-out score"}.get(str(measure), "validation loss")

    def evaluates_at(self, step: int, total_steps: int, interval: int) -> bool:
        """Whether held-out rows are measured after this many steps. interval: where the config names none."""
        return _is_due(self.evaluation.every or interval, step, total_steps)

    def saves_at(self, step: int, total_steps: int) -> bool:
        """Whether a checkpoint is written after this many steps."""
        return _is_due(self.checkpoint.every, step, total_steps) or bool(
            self.milestones_at(step, total_steps)
        )

    def milestones_at(self, step: int, total_steps: int) -> list[str]:
        """Names of the milestones that are reached after this many steps."""
        return [name for name, at in self.checkpoint.milestone_steps(total_steps).items() if at == step]


def _is_due(every: int | None, step: int, total_steps: int) -> bool:
    return step == total_steps or (every is not None and step % every == 0)
