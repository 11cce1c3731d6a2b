"""Config shared by the stages that train a policy by reinforcement learning."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tuner.config.adapter import Adapter
from tuner.config.alarms import Alarms
from tuner.config.base import ConfigBase
from tuner.config.data import Prompts, Replay
from tuner.config.engine_config import VLLM, Engine
from tuner.config.evaluation import PolicyEvaluation
from tuner.config.memory_size import AUTO
from tuner.config.model import Model
from tuner.config.policy_rewards import (
    Combine,
    LengthPenalty,
    PreferenceReward,
    Reward,
    Rule,
    as_model,
    as_rule,
)
from tuner.config.sampling import Sampling
from tuner.config.stage_config import TrainingConfig
from tuner.config.training import AdamW, Checkpoint, Constant, Schedule


class AdaptiveKL(ConfigBase):
    """A KL coefficient that follows a target (Ziegler et al., arXiv 1909.08593, 2.2).

    After each step that trains the policy: coefficient · (1 + clip(KL / target − 1, ±0.2) · answers / horizon).
    """

    target: float = Field(gt=0)
    """KL divergence from the reference to hold, in nats per answer: summed over its tokens (`kl_per_answer`), by k1."""

    horizon: int = Field(default=10_000, ge=1)
    """Answers over which the coefficient changes by at most a factor of about 1.22: fewer adapt it faster."""

    initial: float = Field(default=0.2, gt=0)
    """Coefficient of the first step."""


KL = Annotated[float, Field(ge=0)] | AdaptiveKL
"""KL penalty coefficient: a number, or what adapts it."""


class PolicyConfig(TrainingConfig):
    """Reinforcement learning of a policy from the scores of its own answers.

    A step is one rollout and all its updates. Dropout is 0 in every role.
    """

    implementation: ClassVar[str] = "tuner.stages.rl.stage"

    algorithm: ClassVar[str]
    """`module:class` of the algorithm that turns a rollout into losses."""

    policy: Annotated[Model, BeforeValidator(as_model)]
    """The model to train; its initial weights also serve as the reference policy, unless `reference` names another."""

    adapter: Adapter | None = None
    """Train an adapter of the policy instead of its weights. A policy that is a run with an adapter continues it."""

    reference: Annotated[Model, BeforeValidator(as_model)] | None = None
    """The policy that KL is measured from (a run, a folder or a hub name), such as the SFT policy of a policy that an
    earlier round has trained; None: the policy as it starts. It must have the policy's tokenizer."""

    reward: Reward
    """The reward model (a run, a folder or a hub name), or a rule: `file.py:name` of a function (answer, row) ->
    float."""

    further_rewards: tuple[Annotated[Model, BeforeValidator(as_model)], ...] = ()
    """Further reward models that score every answer: with `reward` an ensemble. Each one's scores are standardized by
    the mean and standard deviation of its held-out answers, as its training recorded them. Where they disagree is
    logged as `disagreement`."""

    combine: Combine = "min"
    """The score that `reward` and `further_rewards` give together: their "mean", "min" or "mean_minus_variance"."""

    variance_coefficient: float = Field(default=0.1, ge=0)
    """Coefficient of the variance in combine="mean_minus_variance" (0.1 in the PPO of Coste et al.)."""

    added_rewards: tuple[Annotated[Rule, BeforeValidator(as_rule)], ...] = ()
    """Rules whose scores, times their weights, are added to the reward's: the sum is the score. Each part's mean is
    logged as score_of/NAME."""

    roles: Literal["shared", "separate"] = "shared"
    """"shared": each distinct base is loaded once, frozen, and the roles (policy, reference, critic, reward model) are
    adapters and heads on it (a `reference` or reward model of another base than the policy's is its own model);
    "separate": one model per role."""

    prompts: Prompts
    """Prompts the policy answers."""

    prompts_per_step: int = Field(default=512, ge=1)
    """Prompts per rollout, over all devices."""

    sampling: Sampling = Sampling()
    """How answers are sampled."""

    engine: Engine = "local"
    """What answers the prompts: "local", the model in training; VLLM(): a vLLM server, whose rollouts are stored before
    they are used."""

    kl: KL = 0.01
    """KL penalty coefficient; AdaptiveKL(target=...): adapted to hold a KL divergence."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator of the KL divergence from the reference (Schulman, 2020): the log-ratio (k1, unbiased), half
    its square (k2), or the unbiased non-negative one (k3). None is unbiased where `sampling` leaves tokens out (top_p,
    top_k, min_new_tokens): log-probabilities are over the full vocabulary."""

    max_kl: float | None = Field(default=None, gt=0)
    """Training ends after a step whose answers have a mean KL divergence from the reference above this, in nats per
    token (GRPO and RLOO hold a reference for it); None: it never ends for that."""

    alarms: Alarms = Alarms()
    """What the run does where its figures show that it goes wrong: warn, stop, or roll back."""

    entropy_bonus: float = Field(default=0.0, ge=0)
    """Coefficient of the entropy bonus: this times the policy's mean entropy per answer token, in nats over the full
    vocabulary, is subtracted from the loss; 0: none."""

    clip: float = Field(default=0.2, gt=0)
    """Clip range of the probability ratio: 1 ± this (PPO, arXiv 1707.06347)."""

    reward_clip: float | None = Field(default=5.0, gt=0)
    """Scores are clipped to ± this, before they are normalized; None: not clipped. OpenRLHF and trlX clip at 10, TRL
    and verl do not."""

    normalize_rewards: bool = True
    """Standardize scores by their running mean and standard deviation over the run. OpenRLHF's `normalize_reward` and
    trlX's `scale_reward="running"` do so by choice, TRL's `whiten_rewards` by the step's alone, verl does not."""

    preference_reward: PreferenceReward | None = None
    """Reward with the probability that an answer is preferred to the reference policy's, in place of the score itself;
    takes the place of `reward_clip` and `normalize_rewards`. None: the score."""

    missing_end_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the score of an answer truncated at max_new_tokens, before scores are clipped."""

    mask_truncated: bool = False
    """Leave answers truncated at max_new_tokens out of all losses (DAPO's overlong filtering, arXiv 2503.14476); their
    scores still count in baselines and figures."""

    length_penalty: LengthPenalty | None = None
    """Penalty on long answers, taken off their scores before clipping; None: none."""

    update_epochs: int = Field(default=1, ge=1)
    """Epochs of updates on each rollout."""

    mini_batches: int = Field(default=1, ge=1)
    """Mini-batches a rollout is split into, one optimizer step each."""

    optimizer: AdamW = AdamW(lr=1e-6)
    """Optimizer settings; the learning rate is the policy's."""

    schedule: Schedule = Constant(warmup=0)
    """Learning rate schedule."""

    replay: Replay | None = None
    """Rows of earlier stages trained on alongside the rollouts, against forgetting (PPO-ptx)."""

    tokens_per_pass: int = Field(default=32_768, ge=1)
    """Tokens in one forward and backward pass: affects memory and speed, never the result."""

    max_bad_steps: int = Field(default=3, ge=1)
    """Updates with a non-finite loss or gradient are skipped; training stops after this many consecutive steps with
    one."""

    checkpoint: Checkpoint = Checkpoint(every=20)
    """When checkpoints are saved, and how many are kept."""

    evaluation: PolicyEvaluation = PolicyEvaluation()
    """Evaluation on held-out prompts."""

    @property
    def reward_model(self) -> Model | None:
        """The reward model; None where a rule scores answers."""
        return self.reward if isinstance(self.reward, Model) else None

    @property
    def reward_models(self) -> tuple[Model, ...]:
        """The reward models: `reward` and `further_rewards`; none where a rule scores answers."""
        return (self.reward, *self.further_rewards) if isinstance(self.reward, Model) else ()

    @model_validator(mode="after")
    def _free_memory_is_the_trainers(self) -> Self:
        if self.memory == AUTO and isinstance(self.engine, VLLM) and self.engine.url is None:
            raise ValueError(
                'memory="auto" is what the GPU has free before engine=VLLM() starts its server there, which takes half '
                'of it: write the size that is left to the trainer, such as "40GiB"'
            )
        return self

    @model_validator(mode="after")
    def _an_ensemble_is_of_models(self) -> Self:
        if self.further_rewards and self.reward_model is None:
            raise ValueError(
                "further_rewards score beside a reward model, and reward is a rule: name a reward model in reward, and "
                "add the rule by added_rewards"
            )
        return self

    @model_validator(mode="after")
    def _a_preference_is_bounded_already(self) -> Self:
        if self.preference_reward is not None and (self.reward_clip is not None or self.normalize_rewards):
            raise ValueError(
                "preference_reward takes the place of reward_clip and normalize_rewards, which would distort a "
                "probability: write reward_clip=None and normalize_rewards=False"
            )
        return self

    @model_validator(mode="after")
    def _rows_fit_a_pass(self) -> Self:
        longest = self.prompts.max_length + self.sampling.max_new_tokens
        if longest > self.tokens_per_pass:
            raise ValueError(
                f"a prompt of prompts.max_length ({self.prompts.max_length}) with an answer of "
                f"sampling.max_new_tokens ({self.sampling.max_new_tokens}) does not fit tokens_per_pass "
                f"({self.tokens_per_pass}): lower the first two or raise the last to {longest}"
            )
        if self.replay is not None and self.replay.max_length > self.tokens_per_pass:
            raise ValueError(
                f"replay.max_length ({self.replay.max_length}) is more than tokens_per_pass "
                f"({self.tokens_per_pass}), and rows are never truncated to fit: lower the first or raise the second"
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
    def _the_best_is_measured(self) -> Self:
        best, held_out = self.evaluation.keep_best, self.prompts.split.test or self.prompts.test_files
        if best is not None and not held_out:
            raise ValueError(
                "evaluation.keep_best needs test prompts: add prompts.test_files or prompts.split=Split(test=0.02)"
            )
        if best == "gold" and self.evaluation.rule is None:
            raise ValueError(
                'evaluation.keep_best="gold" needs a gold score: add evaluation.rule, or write "score"'
            )
        return self

    @model_validator(mode="after")
    def _an_alarm_has_its_figure(self) -> Self:
        if self.alarms.exploits != "warn" and not (self.evaluation.rule and self.evaluation.rule_on_rollouts):
            raise ValueError(
                f"alarms.exploits={self.alarms.exploits!r} needs a gold score of the rollouts: add evaluation.rule "
                'with evaluation.rule_on_rollouts=True, or write "warn"'
            )
        return self

    @model_validator(mode="after")
    def _a_mini_batch_has_prompts(self) -> Self:
        if self.mini_batches > self.prompts_per_step:
            raise ValueError(
                f"mini_batches ({self.mini_batches}) is more than prompts_per_step ({self.prompts_per_step}), so some "
                "would be empty: change one of them"
            )
        return self

    @model_validator(mode="after")
    def _the_coefficient_moves_slowly(self) -> Self:
        answers = self.prompts_per_step * getattr(self, "answers_per_prompt", 1)
        if isinstance(self.kl, AdaptiveKL) and self.kl.horizon < answers:
            raise ValueError(
                f"kl.horizon ({self.kl.horizon}) is less than the answers of a step ({answers}), so that a step could "
                "change the coefficient by more than a fifth: raise it"
            )
        return self

    @model_validator(mode="after")
    def _quantized_policy_has_an_adapter(self) -> Self:
        if self.policy.quantization and self.adapter is None:
            raise ValueError(
                f"policy.quantization={self.policy.quantization!r} can only train an adapter: "
                "add adapter=LoRA(), or leave quantization out"
            )
        return self

    @model_validator(mode="after")
    def _the_gap_of_a_server_can_be_measured(self) -> Self:
        sampling = self.sampling
        if isinstance(self.engine, VLLM) and sampling.temperature != 1 and sampling.is_truncated:
            raise ValueError(
                f"engine=VLLM(): at sampling.temperature={sampling.temperature:g} vLLM reports log-probabilities of "
                "what top_p, top_k and min_new_tokens leave, which are not those that the trainer computes: write "
                "temperature=1.0, or top_p=1.0 without top_k and min_new_tokens"
            )
        return self

    @model_validator(mode="after")
    def _dropout_is_off(self) -> Self:
        for name in ("adapter", "critic_adapter"):
            adapter = getattr(self, name, None)
            if adapter is not None and adapter.dropout:
                raise ValueError(
                    f"{name}.dropout must be 0 in reinforcement learning, or it would add noise to the probability "
                    "ratios; write 0"
                )
        return self
