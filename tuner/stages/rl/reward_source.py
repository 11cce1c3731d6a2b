"""What scores a policy stage's answers, in training and in evaluation."""

from __future__ import annotations

from tuner.config import PolicyConfig, Rule
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs
from tuner.rollout.reward_sources import ModelReward, RewardSource, RuleReward, SummedReward
from tuner.rollout.rules import load_rule
from tuner.training.devices import Devices


def reward_source(
    config: PolicyConfig, roles: Roles | None, inputs: RewardInputs | None, devices: Devices
) -> RewardSource:
    """The config's rule or the loaded reward model, with what is added to it.

    roles: has the role `reward`; it and `inputs` may be None where a rule scores. Raises UserError where the rule is
    missing or takes other arguments.
    """
    if isinstance(config.reward, Rule):
        reward: RewardSource = _rule_reward(config.reward, "reward", devices)
    else:
        assert roles is not None
        assert inputs is not None
        reward = ModelReward(roles, inputs, config.tokens_per_pass, devices)
    if not config.added_rewards:
        return reward
    sources = {"reward": reward}
    for index, rule in enumerate(config.added_rewards):
        reference = str(rule.function)
        name = reference.rpartition(":")[2]
        sources[reference if name in sources else name] = _rule_reward(
            rule, f"added_rewards.{index}", devices
        )
    return SummedReward(sources)


def _rule_reward(rule: Rule, field: str, devices: Devices) -> RuleReward:
    function = load_rule(rule.function, field)
    assert function is not None
    return RuleReward(function, f"{field} {rule.function!r}", rule.weight, devices)
