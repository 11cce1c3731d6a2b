"""Config of Kahneman-Tversky optimization."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.data import Preferences
from tuner.config.evaluation import Validation
from tuner.config.stage_config import SingleModelConfig
from tuner.config.training import AdamW, Cosine, Schedule
from tuner.config.trl_fields import refuse_unsupported


class KTO(SingleModelConfig):
    """Kahneman-Tversky optimization (arXiv 2402.01306) with TRL's KTOTrainer: trains a policy on answers that are each
    desirable or not.

    Rows have one answer and a `label`; those of preferences are read, too: the best answers are desirable, all others
    are not. The policy never sees a condition, and margins are ignored; the log counts what was ignored. Dropout is 0.
    Defaults are for full-parameter training; adapters need about ten times the learning rate.
    """

    implementation: ClassVar[str] = "tuner.stages.kto.stage"
    keeps_milestones: ClassVar[bool] = False
    in_layouts: ClassVar[bool] = False

    stage: Literal["kto"] = "kto"
    """Name of the stage, in JSON."""

    data: Preferences
    """Labeled answers or preferences to train on."""

    beta: float = Field(default=0.1, gt=0)
    """KL penalty coefficient: how strongly the policy is tied to its initial weights."""

    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Loss per answer, by TRL's name: KTO, or the unpaired variant of APO-zero, which estimates no KL."""

    desirable_weight: float = Field(default=1.0, gt=0)
    """Factor on the loss of desirable answers. In KTO's paper, number times weight of desirable answers is 1 to 1.33
    times that of the others."""

    undesirable_weight: float = Field(default=1.0, gt=0)
    """Factor on the loss of undesirable answers."""

    precompute_reference: bool = False
    """Compute the reference's log-probabilities of all rows once, before training: no further forward passes in each
    step, and no second model beside full weights."""

    optimizer: AdamW = AdamW(lr=1e-6)
    """Optimizer settings."""

    schedule: Schedule = Cosine(warmup=0.1)
    """Learning rate schedule."""

    answers_per_step: int = Field(default=64, ge=2)
    """Answers per optimizer step, over all devices. The last step of an epoch is smaller."""

    answers_per_pass: int = Field(default=8, ge=2)
    """Answers in one forward and backward pass, padded to the longest. KL is estimated within a pass, from each of its
    prompts with the answer to another: the more, the steadier."""

    evaluation: Validation = Validation()
    """Validation during training."""

    @property
    def tokens_per_pass(self) -> int:
        """Most tokens in a pass, padding included."""
        return self.answers_per_pass * self.data.max_length

    @model_validator(mode="after")
    def _passes_fill_a_step(self) -> Self:
        if self.answers_per_step % self.answers_per_pass:
            raise ValueError(
                f"answers_per_step ({self.answers_per_step}) is not a multiple of answers_per_pass "
                f"({self.answers_per_pass}), so passes cannot fill a step: change one of them"
            )
        return self

    @model_validator(mode="after")
    def _trl_supports_every_field(self) -> Self:
        refuse_unsupported("TRL's KTO", self.data, self.adapter, self.evaluation)
        return self
