"""What scores a policy stage's answers, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from tuner.config import PolicyConfig, Rule
from tuner.errors import UserError
from tuner.evaluation.win_rate import Scorer
from tuner.models.reward_record import Reference
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs
from tuner.rollout.reward_sources import (
    EnsembleReward,
    ModelReward,
    RewardSource,
    RuleReward,
    SummedReward,
)
from tuner.rollout.rules import load_rule
from tuner.training.devices import Devices


def reward_source(
    config: PolicyConfig, roles: Roles | None, inputs: Mapping[str, RewardInputs], devices: Devices
) -> RewardSource:
    """The config's rule or the loaded reward models, with what is added to them.

    roles: has the roles of the reward models; None where a rule scores. inputs: by role. Raises UserError where the
    rule is missing or takes other arguments, or as `references` does.
    """
    if isinstance(config.reward, Rule):
        reward: RewardSource = _rule_reward(config.reward, "reward", devices)
    else:
        assert roles is not None
        models = [
            ModelReward(roles, read, config.tokens_per_pass, devices, role) for role, read in inputs.items()
        ]
        reward = models[0]
        if config.further_rewards:
            statistics = references(config, inputs)
            reward = EnsembleReward(models, statistics, config.combine, config.variance_coefficient)
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


def scorer_of(config: PolicyConfig) -> Scorer:
    """What gives the scores, in words."""
    if config.reward_model is None:
        return "reward rule"
    return "reward models" if config.further_rewards else "reward model"


def references(config: PolicyConfig, inputs: Mapping[str, RewardInputs]) -> list[Reference]:
    """What the scores of each reward model of an ensemble are standardized by; none for a single reward model.

    Raises UserError where a reward model has no such statistics.
    """
    if not config.further_rewards:
        return []
    statistics: list[Reference] = []
    for model, read in zip(config.reward_models, inputs.values(), strict=True):
        reference = read.record.reference
        if reference is None or not reference.standard_deviation > 0:
            raise UserError(
                f"{model.path}: no mean and standard deviation of its scores on held-out answers is recorded, so they "
                "cannot be compared with those of the other reward models; train it with held-out pairs "
                "(data.split.test), or leave further_rewards out"
            )
        statistics.append(reference)
    return statistics


def _rule_reward(rule: Rule, field: str, devices: Devices) -> RuleReward:
    function = load_rule(rule.function, field)
    assert function is not None
    return RuleReward(function, f"{field} {rule.function!r}", rule.weight, devices)
