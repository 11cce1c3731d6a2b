"""Config of REINFORCE leave-one-out."""

from typing import ClassVar, Literal

from pydantic import Field

from tuner.config.policy_config import KL, PolicyConfig


class RLOO(PolicyConfig):
    """REINFORCE leave-one-out (arXiv 2402.14740): several answers per prompt, no critic.

    An answer is a single action; its baseline is the mean reward of the other answers to the same prompt.
    """

    algorithm: ClassVar[str] = "tuner.algorithms.rloo:RLOO"

    stage: Literal["rloo"] = "rloo"
    """Name of the stage, in JSON."""

    prompts_per_step: int = Field(default=64, ge=1)
    """Prompts per rollout, over all devices."""

    answers_per_prompt: int = Field(default=8, ge=2)
    """Answers sampled per prompt: the size of a group."""

    kl: KL = 0.05
    """Coefficient of the KL penalty in each answer's reward; AdaptiveKL(target=...): adapted to hold a KL divergence.
    0: no reference policy is loaded, unless `reference`, `max_kl` or an action of `alarms.kl` is set."""

    reward_clip: float | None = Field(default=None, gt=0)
    """Scores are clipped to ± this, before they are normalized; None: not clipped."""

    normalize_rewards: bool = False
    """Standardize scores by their running mean and standard deviation over the run."""
