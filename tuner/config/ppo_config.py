"""Config of proximal policy optimization."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.adapter import Adapter
from tuner.config.model import Model
from tuner.config.policy_config import KL, PolicyConfig
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

    kl: KL = 0.01
    """Coefficient of the KL penalty in each token's reward; AdaptiveKL(target=...): adapted to hold a KL divergence,
    from the end of the critic warm-up."""

    critic_from: Literal["reward", "policy"] = "reward"
    """Model the critic is initialized from, with a fresh value head."""

    critic_adapter: Adapter | None = None
    """Adapter of a critic initialized from a model without one; None: like the policy's with roles="shared", none (all
    weights are trained) with roles="separate"."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount factor per token, from 0 to 1."""

    gae_lambda: float = Field(default=0.99, ge=0, le=1)
    """Lambda of generalized advantage estimation (GAE, arXiv 1506.02438), from 0 to 1."""

    value_gae_lambda: float | None = Field(default=None, ge=0, le=1)
    """Lambda of the returns the critic is trained on; None: `gae_lambda`. VC-PPO and VAPO (arXiv 2503.01491,
    2504.05118) use 1 here: returns of long answers then reach back undiscounted to their first tokens."""

    value_clip: float | None = Field(default=None, gt=0)
    """Clip range of the value around its old estimate in the value loss; None: not clipped, as in the InternLM2 report.
    TRL and trlX clip at 0.2, verl at 0.5; the range is in units of the reward, so it goes with `normalize_rewards`."""

    whiten_advantages: bool = False
    """Normalize the step's advantages to mean 0, standard deviation 1 over all its answer tokens. TRL, trlX, OpenRLHF
    and verl do; the InternLM2 report does not. Values and returns are never whitened."""

    critic_warmup: int = Field(default=50, ge=0)
    """Number of initial steps that train only the critic."""

    critic_updates: int = Field(default=1, ge=1)
    """Optimizer steps of the critic per mini-batch, in its warm-up, too; the policy takes one. Peers give the critic
    epochs of its own (verl's `critic.ppo_epochs`)."""

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
