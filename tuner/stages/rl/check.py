"""A policy stage's dry run: its models without weights, its prompts and replayed rows, its memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from tuner.algorithms.algorithm import Algorithm, algorithm_of
from tuner.config import Model, PolicyConfig, Rule
from tuner.data.dataset import load_data
from tuner.data.load_prompts import load_prompts
from tuner.models.load_roles import PolicyRoles, load_policy_roles
from tuner.models.rope import describe_rope
from tuner.rollout.rules import load_rule
from tuner.stages.check import CheckReport
from tuner.stages.rl.models import policy_models
from tuner.stages.rl.prompts import plan_run, reward_reader


def check_policy(config: PolicyConfig, stand_ins: frozenset[str]) -> CheckReport:
    """See Stage.check."""
    load_rule(config.evaluation.rule, "evaluation.rule")
    if isinstance(config.reward, Rule):
        load_rule(config.reward.function, "reward")
    algorithm = algorithm_of(config)
    ...
