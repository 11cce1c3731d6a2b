"""Config of direct preference optimization."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.data import Preferences
from tuner.config.evaluation import Validation
from tuner.config.stage_config import SingleModelConfig
from tuner.config.training import AdamW, Cosine, Schedule
from tuner.config.trl_fields import refuse_unsupported


class DPO(SingleModelConfig):
    """Direct preference optimization (arXiv 2305.18290) with TRL's DPOTrainer: trains a policy on preference pairs.

    It takes the same data as RewardModel, so that both can be compared. The policy never sees a condition, margins
    are ignored, and every pair of a ranked list counts as a pair of its own; the log counts what was ignored. Dropout
    is 0. Defaults are for full-parameter training; adapters need about ten times the learning rate.
    """

    implementation: ClassVar[str] = "tuner.stages.dpo.stage"
    keeps_milestones: ClassVar[bool] = False
    in_layouts: ClassVar[bool] = False

    stage: Literal["dpo"] = "dpo"
    """Name of the stage, in JSON."""

    data: Preferences
    """Preferences to train on."""

    beta: float = Field(default=0.1, gt=0)
    """KL penalty coefficient: how strongly the policy is tied to its initial weights; for "ipo", its tau."""

    loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "apo_zero", "apo_down"] = "sigmoid"
    """Loss per preference pair, by TRL's name: DPO, length-normalized DPO, SLiC hinge, IPO, robust DPO (for noisy
    labels), APO. "sigmoid_norm" and "ipo" take an answer's log-probability per token, so that beta is larger there."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed fraction of wrong labels, from 0 to below 0.5: conservative DPO with "sigmoid" (cDPO, Mitchell, 2023), or
    that of "robust" (arXiv 2403.00409), where it is required."""

    nll_weight: float = Field(default=0.0, ge=0)
    """Coefficient of the better answers' negative log-likelihood per token, added to the loss (RPO, arXiv 2404.19733);
    0: none. TRL averages it within each pass."""

    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Factor of the log-probabilities of tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411): less
    preference for length; None: 1."""

    precompute_reference: bool = False
    """Compute the reference's log-probabilities of all rows once, before training: no second forward pass in each step,
    and no second model beside full weights."""

    optimizer: AdamW = AdamW(lr=1e-6)
    """Optimizer settings."""

    schedule: Schedule = Cosine(warmup=0.1)
    """Learning rate schedule."""

    pairs_per_step: int = Field(default=64, ge=1)
    """Pairs per optimizer step, over all devices. The last step of an epoch is smaller; devices left without pairs
    repeat earlier ones."""

    pairs_per_pass: int = Field(default=4, ge=1)
    """Pairs in one forward and backward pass, padded to the longest answer: affects memory and speed. (In a smaller
    last step TRL weights a partial pass like a full one.)"""

    evaluation: Validation = Validation()
    """Validation during training."""

    @property
    def tokens_per_pass(self) -> int:
        """Most tokens in a pass, padding included."""
        return 2 * self.pairs_per_pass * self.data.max_length

    @model_validator(mode="after")
    def _passes_fill_a_step(self) -> Self:
        if self.pairs_per_step % self.pairs_per_pass:
            raise ValueError(
                f"pairs_per_step ({self.pairs_per_step}) is not a multiple of pairs_per_pass "
                f"({self.pairs_per_pass}), so passes cannot fill a step: change one of them"
            )
        return self

    @model_validator(mode="after")
    def _smoothing_belongs_to_the_loss(self) -> Self:
        needs, takes = self.loss == "robust", self.loss in ("robust", "sigmoid")
        if (needs and not self.label_smoothing) or (self.label_smoothing and not takes):
            raise ValueError(
                f'label_smoothing={self.label_smoothing} with loss={self.loss!r}: the "robust" loss needs label '
                'smoothing, "sigmoid" may have it, and no other loss uses it; change one of them'
            )
        return self

    @model_validator(mode="after")
    def _trl_supports_every_field(self) -> Self:
        refuse_unsupported("TRL's DPO", self.data, self.adapter, self.evaluation)
        return self
