"""Config of proximal policy optimization."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.adapter import Adapter
from tuner.config.model import Model
from tuner.config.policy_config import PolicyConfig
from tuner.config.training import Constant, Schedule


class PPO(PolicyConfig):
    """Proximal policy optimization against a conditional reward model, with a critic and a pre-training mix.

    Defaults are the numbers of the InternLM2 report (arXiv 2403.17297, 4.2.3) for full-parameter training;
    adapters need about ten times the learning rate. A step is one rollout and all its updates, including those of
    the critic warm-up.
    """

    algorithm: ClassVar[str] = "tuner.algorithms.ppo:PPO"

    stage: Literal["ppo"] = "ppo"
    """Name of the stage, in JSON."""

    kl: float = Field(default=0.01, ge=0)
    """Coefficient of the KL penalty in each token's reward."""

    critic_from: Literal["reward", "policy"] = "reward"
    """Model the critic is initialized from, with a fresh value head."""

    critic_adapter: Adapter | None = None
    """Adapter of a critic initialized from a model without one; None: like the policy's with roles="shared", none (all
    weights are trained) with roles="separate"."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount factor per token, from 0 to 1."""

    gae_lambda: float = Field(default=0.99, ge=0, le=1)
    """Lambda of generalized advantage estimation (GAE, arXiv 1506.02438), from 0 to 1."""

    value_clip: float | None = Field(default=None, gt=0)
    """Clip range of the value around its old estimate in the value loss; None: not clipped."""

    whiten_advantages: bool = False
    """Normalize the step's advantages to mean 0, standard deviation 1."""

    critic_warmup: int = Field(default=50, ge=0)
    """Number of initial steps that train only the critic."""

    critic_lr: float = Field(default=5e-6, gt=0)
    """Peak learning rate of the critic."""

    schedule: Schedule = Constant(warmup=0)
    """Learning rate schedule: the critic's over the run, the policy's from the end of the critic warm-up."""

    @model_validator(mode="after")
    def _quantized_critic_has_an_adapter(self) -> Self:
        from_reward_model = self.roles == "separate" and self.critic_from == "reward"
        model = self.reward_model
        if from_reward_model and model is not None and model.quantization and self.critic_adapter is None:
            raise ValueError(
                f"reward.quantization={model.quantization!r}: a critic on quantized weights can only train an adapter; "
                "add critic_adapter=LoRA(), or leave quantization out"
            )
        return self

    @model_validator(mode="after")
    def _critic_has_a_model_to_start_from(self) -> Self:
        if self.critic_from == "reward" and not isinstance(self.reward, Model):
            raise ValueError(
                'a rule has no weights to initialize the critic from: write critic_from="policy"'
            )
        return self
