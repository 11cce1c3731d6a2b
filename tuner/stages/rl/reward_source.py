"""What scores a policy stage's answers, in training and in evaluation."""

from __future__ import annotations

from tuner.config import PolicyConfig, Rule
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs
from tuner.rollout.reward_sources import ModelReward, RewardSource, RuleReward
from tuner.rollout.rules import load_rule
from tuner.training.devices import Devices


def reward_source(
    config: PolicyConfig, roles: Roles | None, inputs: RewardInputs | None, devices: Devices
) -> RewardSource:
    """The config's rule, or the loaded reward model.

    roles: has the role `reward`; it and `inputs` may be None where a rule scores. Raises UserError where the rule is
    missing or takes other arguments.
    """
    if isinstance(config.reward, Rule):
        rule = load_rule(config.reward.function, "reward")
        assert rule is not None
        return RuleReward(rule, f"reward {config.reward.function!r}", devices)
    assert roles is not None
    assert inputs is not None
    return ModelReward(roles, inputs, config.tokens_per_pass, devices)
