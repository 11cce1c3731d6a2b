"""Config of group relative policy optimization."""

# Narrowing a base field is sound since configs are frozen, but type checkers do not see `frozen` in model_config.
# pyright: reportIncompatibleVariableOverride=false

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from tuner.config.policy_config import KL, PolicyConfig


class GRPO(PolicyConfig):
    """Group relative policy optimization (arXiv 2402.03300): several answers per prompt, no critic.

    An answer's advantage is its score relative to the other answers to the same prompt. `clip_high` and
    `normalization="token"` are DAPO's (arXiv 2503.14476).
    """

    algorithm: ClassVar[str] = "tuner.algorithms.grpo:GRPO"

    stage: Literal["grpo"] = "grpo"
    """Name of the stage, in JSON."""

    prompts_per_step: int = Field(default=64, ge=1)
    """Prompts per rollout, over all devices."""

    answers_per_prompt: int = Field(default=8, ge=2)
    """Answers sampled per prompt: the size of a group."""

    scale_advantages: bool = True
    """Divide advantages by the standard deviation of the group's scores."""

    kl: KL = 0.0
    """Coefficient of the KL penalty in the loss; AdaptiveKL(target=...): adapted to hold a KL divergence. 0: no
    reference policy is loaded, unless `reference`, `max_kl` or an action of `alarms.kl` is set."""

    kl_estimator: Literal["k2", "k3"] = "k3"
    """Per-token estimator of the KL divergence from the reference (Schulman, 2020): half the square of the log-ratio
    (k2), or the non-negative one (k3), unbiased unless `sampling` leaves tokens out (top_p, top_k, min_new_tokens). Not
    k1, whose gradient is 0 in expectation."""

    clip_high: float | None = Field(default=None, gt=0)
    """Upper clip range of the probability ratio: 1 + this; None: same as `clip`."""

    normalization: Literal["token", "answer"] = "token"
    """Averaging of the loss: "token" over all tokens of the mini-batch; "answer" over the tokens of each answer first,
    as in the original paper."""

    reward_clip: float | None = Field(default=None, gt=0)
    """Scores are clipped to ± this, before they are normalized; None: not clipped."""

    normalize_rewards: bool = False
    """Standardize scores by their running mean and standard deviation over the run."""

    @field_validator("kl_estimator", mode="before")
    @classmethod
    def _pulls_towards_the_reference(cls, value: Any) -> Any:
        # E[∇ log p(token)] = 0 over tokens that the policy samples: in a loss, k1 is noise without a direction.
        if value == "k1":
            raise ValueError('the gradient of "k1" in a loss is 0 in expectation; write "k2" or "k3"')
        return value
