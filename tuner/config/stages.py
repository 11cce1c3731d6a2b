"""The stages: each config file holds one of these values, named `config`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tuner.config.data import Chat, Preferences, Prompts, Text
from tuner.config.loss import FocalRanking
from tuner.config.model import LoRA, Model
from tuner.config.rollout import PolicyEvaluation, Replay, Sampling
from tuner.config.stage import ModelStage, PackedStage, Stage
from tuner.config.training import (
    AdamW,
    Checkpoint,
    Constant,
    Cosine,
    Evaluation,
    PairEvaluation,
    Schedule,
    Validation,
)


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


def _named(value: Any) -> Any:
    """A model by its path alone."""
    return {"path": value} if isinstance(value, str) else value


class PPO(Stage):
    """Proximal policy optimisation against a conditional reward model, with a critic and a pre-training mix.

    As in the InternLM2 report (arXiv 2403.17297, 4.2.3), whose numbers the defaults are; they are for training all
    weights: adapters want learning rates about ten times as high. A step is one rollout and all its updates, those
    of the critic's warm-up too. Dropout is 0 in every role.
    """

    stage: Literal["ppo"] = "ppo"
    """Which stage this is, in JSON."""

    policy: Annotated[Model, BeforeValidator(_named)]
    """What is trained; as it is at the start it is also the reference that the policy is kept near to."""

    adapter: LoRA | None = None
    """Train an adapter of the policy instead of its weights. A policy that is a run with an adapter continues it."""

    reward: Annotated[Model, BeforeValidator(_named)]
    """The reward model: a run, a folder or a hub name."""

    roles: Literal["shared", "separate"] = "shared"
    """"shared": every base is held once, frozen, and policy, reference, critic and reward are adapters and heads on
    it, all four on one where policy and reward model were trained on the same; "separate": four models."""

    critic_from: Literal["reward", "policy"] = "reward"
    """What the critic is at the start, below its fresh head."""

    critic_adapter: LoRA | None = None
    """Adapter of a critic that starts from a model without one; None: like the policy's, and with "separate" all its
    weights are trained."""

    prompts: Prompts
    """What is answered."""

    prompts_per_step: int = Field(default=512, ge=1)
    """Prompts of a rollout, over all devices."""

    sampling: Sampling = Sampling()
    """How they are answered."""

    kl: float = Field(default=0.01, ge=0)
    """How dear it is to leave the reference: taken off the reward of every token, per nat."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of a token's divergence from the reference (Schulman, 2020): the log-ratio, half its square, or the
    one that is never negative and without bias."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount of a reward per token of delay."""

    gae_lambda: float = Field(default=0.99, ge=0, le=1)
    """How far advantages look ahead before they trust the critic (GAE, arXiv 1506.02438)."""

    clip: float = Field(default=0.2, gt=0)
    """A token's ratio of new to old probability counts up to 1 plus or minus this (PPO, arXiv 1707.06347)."""

    value_clip: float | None = Field(default=None, gt=0)
    """How far a value may move in a step before its loss stops falling; None: it may."""

    whiten_advantages: bool = False
    """Shift and scale the step's advantages to mean 0 and spread 1."""

    reward_clip: float | None = Field(default=5.0, gt=0)
    """Scores are cut to plus and minus this; None: never."""

    normalize_rewards: bool = True
    """Divide scores by their running spread, from their running mean, over the whole run."""

    missing_end_penalty: float = Field(default=0.0, ge=0)
    """Taken off the score of an answer that was cut off at max_new_tokens."""

    update_epochs: int = Field(default=1, ge=1)
    """How often a rollout is learned from."""

    mini_batches: int = Field(default=1, ge=1)
    """Parts of a rollout, each with an optimiser step of its own."""

    critic_warmup: int = Field(default=50, ge=0)
    """Steps at the start in which the critic alone is trained."""

    critic_lr: float = Field(default=5e-6, gt=0)
    """Peak learning rate of the critic."""

    optimizer: AdamW = AdamW(lr=1e-6)
    """How weights follow their gradients; its learning rate is the policy's."""

    schedule: Schedule = Constant(warmup=0)
    """How learning rates move: the critic's over the run, the policy's from the end of the critic's warm-up on."""

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Longer gradients (L2 over all weights of the policy, or of the critic) are scaled to this; None: never."""

    replay: Replay | None = None
    """Rows of earlier stages learned beside the rollouts, so that the policy does not forget (PPO-ptx)."""

    tokens_per_pass: int = Field(default=32_768, ge=1)
    """What one forward and backward pass holds, in tokens: memory and speed, never the result."""

    max_bad_steps: int = Field(default=3, ge=1)
    """Updates with a loss or gradient that is not finite are skipped; after so many steps in a row with one,
    training stops."""

    checkpoint: Checkpoint = Checkpoint(every=20)
    """When the run is saved."""

    evaluation: PolicyEvaluation = PolicyEvaluation()
    """What is measured on held-out prompts."""

    @model_validator(mode="after")
    def _rows_fit_a_pass(self) -> Self:
        longest = self.prompts.max_length + self.sampling.max_new_tokens
        if longest > self.tokens_per_pass:
            raise ValueError(
                f"a prompt of prompts.max_length ({self.prompts.max_length}) with its answer of "
                f"sampling.max_new_tokens ({self.sampling.max_new_tokens}) is more than tokens_per_pass "
                f"({self.tokens_per_pass}): lower the first two or raise the last to {longest}"
            )
        if self.replay is not None and self.replay.max_length > self.tokens_per_pass:
            raise ValueError(
                f"replay.max_length ({self.replay.max_length}) is more than tokens_per_pass "
                f"({self.tokens_per_pass}): a row is never cut to fit; lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _a_rule_needs_answers(self) -> Self:
        if self.evaluation.rule is not None and not (self.prompts.split.test or self.prompts.test_files):
            raise ValueError(
                "evaluation.rule needs test prompts: add prompts.test_files or prompts.split=Split(test=0.02)"
            )
        return self

    @model_validator(mode="after")
    def _a_mini_batch_has_prompts(self) -> Self:
        if self.mini_batches > self.prompts_per_step:
            raise ValueError(
                f"mini_batches ({self.mini_batches}) is more than prompts_per_step ({self.prompts_per_step}): "
                "change one of them"
            )
        return self

    @model_validator(mode="after")
    def _quantised_weights_are_not_trained(self) -> Self:
        trained = [("policy", self.policy, self.adapter)]
        if self.roles == "separate" and self.critic_from == "reward":
            trained.append(("reward", self.reward, self.critic_adapter))
        for name, model, adapter in trained:
            if model.quantization and adapter is None:
                field = "adapter" if name == "policy" else "critic_adapter"
                raise ValueError(
                    f"{name}.quantization={model.quantization!r} can only train an adapter: "
                    f"add {field}=LoRA(), or leave quantization out"
                )
        return self

    @model_validator(mode="after")
    def _dropout_is_off(self) -> Self:
        for name, adapter in (("adapter", self.adapter), ("critic_adapter", self.critic_adapter)):
            if adapter is not None and adapter.dropout:
                raise ValueError(f"{name}.dropout: PPO's roles have none, or ratios would be noise; write 0")
        return self


STAGES: dict[str, type[Stage]] = {"sft": SFT, "reward": RewardModel, "dpo": DPO, "ppo": PPO}
"""Stage by the name it has in JSON."""
