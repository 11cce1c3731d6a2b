"""Config of direct preference optimization by TRL."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.data import Preferences
from tuner.config.evaluation import Validation
from tuner.config.stage_config import SingleModelConfig
from tuner.config.training import AdamW, Cosine, Schedule


class DPO(SingleModelConfig):
    """Direct preference optimisation (arXiv 2305.18290) by TRL's DPOTrainer: the policy itself learns from pairs.

    It reads what a RewardModel reads, so that both can be compared; but the policy never sees a condition, a pair
    has no margin, and of a list every pair counts as one: what is left out is counted in the log. Dropout is off.
    Defaults are for training all weights; adapters want a learning rate about ten times as high.
    """

    implementation: ClassVar[str] = "tuner.stages.dpo.stage"

    stage: Literal["dpo"] = "dpo"
    """Which stage this is, in JSON."""

    data: Preferences
    """What is learned from."""

    beta: float = Field(default=0.1, gt=0)
    """How dear it is to leave the model that training starts from; of "ipo" its tau."""

    loss: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"] = "sigmoid"
    """What a pair costs, by TRL's names: DPO's own, SLiC's, IPO's, DPO for labels of which some are wrong, APO's."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Of "robust": the share of labels taken to be wrong."""

    optimizer: AdamW = AdamW(lr=1e-6)
    """How weights follow their gradients."""

    schedule: Schedule = Cosine(warmup=0.1)
    """How the learning rate moves over the run."""

    pairs_per_step: int = Field(default=64, ge=1)
    """What an optimiser step learns from, over all devices, in pairs; what is left of an epoch makes a smaller step,
    filled up with pairs seen before where several devices have none left."""

    pairs_per_pass: int = Field(default=4, ge=1)
    """What one forward and backward pass holds, in pairs, padded to their longest answer: memory and speed. (In a
    smaller last step TRL weighs a pass that is not full like a full one.)"""

    evaluation: Validation = Validation()
    """What is measured on held-out rows."""

    @property
    def tokens_per_pass(self) -> int:
        """What a pass holds at most, in tokens with padding."""
        return 2 * self.pairs_per_pass * self.data.max_length

    @model_validator(mode="after")
    def _passes_fill_a_step(self) -> Self:
        if self.pairs_per_step % self.pairs_per_pass:
            raise ValueError(
                f"pairs_per_step ({self.pairs_per_step}) is not a multiple of pairs_per_pass "
                f"({self.pairs_per_pass}): change one of them"
            )
        return self

    @model_validator(mode="after")
    def _smoothing_belongs_to_robust(self) -> Self:
        if (self.label_smoothing > 0) != (self.loss == "robust"):
            raise ValueError(
                f'label_smoothing={self.label_smoothing} with loss={self.loss!r}: only "robust" smooths labels, '
                "and it must; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _trl_does_without(self) -> Self:
        given = (*self.data.sources, *self.data.validation_sources, *self.data.test_sources)
        for refused, what, instead in (
            (any(one.weight != 1 for one in given), "weight of a source", "leave it out"),
            (any(one.share is not None for one in given), "share of a source", "leave it out, or use limit"),
            (self.data.ties == "half", 'data.ties="half"', 'write "drop"'),
            (self.adapter and self.adapter.dropout, "adapter.dropout", "write 0"),
            (self.evaluation.patience or self.evaluation.keep_best, "evaluation.patience or keep_best", "leave it out"),
        ):  # fmt: skip
            if refused:
                raise ValueError(f"{what}: TRL's DPO has no such thing; {instead}")
        return self
