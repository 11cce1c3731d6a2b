"""Conditional online RLHF in rounds (COOL RLHF, InternLM2, arXiv 2403.17297, 4.2.2)."""

from __future__ import annotations

from tuner.config import COOL
from tuner.stages.context import Context
from tuner.stages.cool.candidates import write_candidates
from tuner.stages.cool.collect import collect_labels
from tuner.stages.cool.finish import finish_rounds
from tuner.stages.cool.patch import patch_reward
from tuner.stages.cool.policy import train_policy
from tuner.stages.cool.rounds import rounds_of, steps_left
from tuner.stages.cool.tracking import track_round


def cool(config: COOL, context: Context) -> None:
    """Train a policy in rounds, each against a reward model that has learned from the labels of all rounds before."""
    rounds = rounds_of(config, context.run.folder)
    assert config.policy.reward_model is not None
    reward, policy = config.policy.reward_model, None
    for place in rounds:
        if (left := steps_left(config, place)) is not None and left <= 0:
            context.say(
                f"round {place.number} and later ones are left out: max_steps={config.max_steps} is reached"
            )
            break
        reward = patch_reward(config, context, place, reward)  # a reward run; its card before and after
        policy = train_policy(config, context, place, reward, policy)  # a policy run, with milestones
        if place is not rounds[-1]:
            write_candidates(config, context, place)  # pairs of its answers, slow and fast path
            track_round(config, context, place)  # in W&B, beside its parts
            collect_labels(config, context, place)  # by people, a judge, rules; may be late
    finish_rounds(config, context)
