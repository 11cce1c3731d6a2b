"""The models that a policy stage's config names, as `load_policy_roles` takes them."""

from __future__ import annotations

from collections.abc import Collection

from tuner.config import PolicyConfig
from tuner.models.load_roles import PolicyModels


def policy_models(config: PolicyConfig, roles: Collection[str]) -> PolicyModels:
    """The models of a config. roles: those the algorithm needs besides the policy and the reward model."""
    reward = config.reward_model
    return PolicyModels(
        policy=config.policy,
        reference=config.reference,
        reward=reward,
        adapter=config.adapter,
        critic_adapter=getattr(config, "critic_adapter", None),
        critic_from=getattr(config, "critic_from", "policy"),
        layout=config.roles,
        roles=frozenset(roles) | ({"reward"} if reward is not None else set()),
        template=config.prompts.template,
        precision=config.precision,
        seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
    )
