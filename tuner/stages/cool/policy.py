"""A round's policy: an ordinary policy run."""

from __future__ import annotations

from tuner.config import COOL, Model
from tuner.stages.context import Context
from tuner.stages.cool.rounds import RoundPlace, policy_config
from tuner.stages.train import train_in


def train_policy(
    config: COOL, context: Context, place: RoundPlace, reward: Model, previous: str | None
) -> str:
    """Train a round's policy against a reward model; returns its path. previous: that of the round before."""
    run = place.policy
    if not run.is_finished:
        context.say(f"round {place.number}: training the policy against {reward.path}")
    train_in(run, policy_config(config, place, reward, previous), within=True)
    context.devices.wait()
    return str(run.folder)
