"""The stages: each config file holds one of these values, named `config`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tuner.config.data import Chat, Data, Preferences, Text
from tuner.config.loss import FocalRanking
from tuner.config.model import Freeze, LoRA, Model
from tuner.config.part import Part
from tuner.config.training import (
    AdamW,
    Checkpoint,
    Cosine,
    Evaluation,
    PairEvaluation,
    Schedule,
    Validation,
    Wandb,
)


class Stage(Part):
    """What belongs to every stage."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder below --runs; None: the config file's name."""

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

    checkpoint: Checkpoint = Checkpoint()
    """When the run is saved."""

    tracking: Wandb | None = None
    """Weights & Biases; None: files only."""


class ModelStage(Stage):
    """A stage that trains one model."""

    model: Model
    """What training starts from."""

    adapter: LoRA | None = None
    """Train an adapter instead of the weights themselves. A model that is a run with an adapter continues it."""

    @model_validator(mode="after")
    def _quantised_weights_are_not_trained(self) -> Self:
        if self.model.quantization and self.adapter is None:
            raise ValueError(
                f"model.quantization={self.model.quantization!r} can only train an adapter: "
                "add adapter=LoRA(), or leave quantization out"
            )
        return self


class PackedStage(ModelStage):
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


class SFT(PackedStage):
    """Supervised fine-tuning, or continued pre-training: full, LoRA or QLoRA."""

    stage: Literal["sft"] = "sft"
    """Which stage this is, in JSON."""

    data: Annotated[Chat | Text, Field(discriminator="kind")]
    """What is learned from."""

    evaluation: Evaluation = Evaluation()
    """What is measured on held-out rows."""

    @model_validator(mode="after")
    def _a_sample_fits_a_pass(self) -> Self:
        if self.data.max_length > self.tokens_per_pass:
            raise ValueError(
                f"data.max_length ({self.data.max_length}) is more than tokens_per_pass "
                f"({self.tokens_per_pass}): a sample is never cut to fit; lower the first or raise the second"
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


class RewardModel(PackedStage):
    """The conditional reward model of InternLM2 (arXiv 2403.17297, 4.2.1): one scalar for every answer.

    Defaults are the paper's, for training all weights; adapters want a learning rate about ten times as high.
    """

    stage: Literal["reward"] = "reward"
    """Which stage this is, in JSON."""

    data: Preferences
    """What is learned from."""

    conditions: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """System prompt by the name that a row gives as its "condition", for the reward model alone: a text, several
    wordings, of which each row draws one by the seed, a `.txt` file of wordings, or `tuner:helpful` and others of
    data_templates/conditions, in all languages, or `tuner:helpful.en` in one."""

    reward_token: str | None = "[UNUSED_TOKEN_130]"
    """Token put after every conversation, whose hidden state is scored; one of the tokenizer's. None: the score
    is read at the conversation's own last token."""

    loss: FocalRanking = FocalRanking()
    """What a pair costs."""

    optimizer: AdamW = AdamW(lr=1e-5, weight_decay=0.01)
    """How weights follow their gradients."""

    schedule: Schedule = Cosine(final=0.5)
    """How the learning rate moves over the run."""

    tokens_per_step: int = Field(default=16_384, ge=1)
    """What an optimiser step learns from, over all devices, in tokens; the paper's batch, of tokens and not pairs."""

    tokens_per_pass: int = Field(default=16_384, ge=1)
    """What one forward and backward pass holds, in tokens; the answers of a row are never split over passes."""

    evaluation: PairEvaluation = PairEvaluation()
    """What is measured on held-out rows."""

    @model_validator(mode="after")
    def _a_pair_fits_a_pass(self) -> Self:
        if 2 * self.data.max_length > self.tokens_per_pass:
            raise ValueError(
                f"two answers of data.max_length ({self.data.max_length}) are more than tokens_per_pass "
                f"({self.tokens_per_pass}): a pair is never split; lower the first to {self.tokens_per_pass // 2} "
                f"or raise the second to {2 * self.data.max_length}"
            )
        return self

    @model_validator(mode="after")
    def _conditions_say_something(self) -> Self:
        for name, prompts in self.conditions.items():
            texts = (prompts,) if isinstance(prompts, str) else prompts
            if not name.strip() or not texts or not all(text.strip() for text in texts):
                raise ValueError(f"conditions: {name!r} has no text; write its system prompt, or take it out")
        return self


class DPO(ModelStage):
    """Direct preference optimisation (arXiv 2305.18290) by TRL's DPOTrainer: the policy itself learns from pairs.

    It reads what a RewardModel reads, so that both can be compared; but the policy never sees a condition, a pair
    has no margin, and of a list every pair counts as one: what is left out is counted in the log. Dropout is off.
    Defaults are for training all weights; adapters want a learning rate about ten times as high.
    """

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


STAGES: dict[str, type[Stage]] = {"sft": SFT, "reward": RewardModel, "dpo": DPO}
"""Stage by the name it has in JSON."""
