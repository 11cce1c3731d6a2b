"""The models that a policy stage's config names, as `load_policy_roles` takes them, and where they are."""

from __future__ import annotations

from collections.abc import Collection

from tuner.config import PolicyConfig
from tuner.models.load_roles import PolicyModels
from tuner.models.reward_roles import reward_role_names


def policy_models(config: PolicyConfig, roles: Collection[str]) -> PolicyModels:
    """The models of a config. roles: those the algorithm needs besides the policy and the reward model."""
    reward = config.reward_model
    # of a policy that is rewarded by comparison with the reference's own answers
    compared = {"reference"} if config.preference_reward is not None else set[str]()
    return PolicyModels(
        policy=config.policy,
        reference=config.reference,
        reward=reward,
        adapter=config.adapter,
        critic_adapter=getattr(config, "critic_adapter", None),
        critic_from=getattr(config, "critic_from", "policy"),
        layout=config.roles,
        roles=frozenset(roles) | compared | ({"reward"} if reward is not None else set()),
        template=config.prompts.template,
        precision=config.precision,
        seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
        mlp_tile=config.mlp_tile,
        further_rewards=config.further_rewards,
    )


def model_paths(config: PolicyConfig) -> dict[str, str]:
    """The paths of a config's models by role."""
    named = {"policy": config.policy, "reference": config.reference}
    rewards = dict(zip(reward_role_names(len(config.reward_models)), config.reward_models, strict=True))
    return {name: model.path for name, model in (named | rewards).items() if model is not None}
