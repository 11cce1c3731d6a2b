"""Part 1 of a step: the policy answers its prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tuner.config import PPO
from tuner.data.prompts import PromptSet
from tuner.models.roles import Roles
from tuner.rollout.rollout import Rollout
from tuner.training.answering import answer_all
from tuner.training.devices import Devices


def answer_prompts(
    roles: Roles,
    prompts: PromptSet,
    chosen: Sequence[int],
    end_ids: Collection[int],
    config: PPO,
    devices: Devices,
    step: int,
) -> Rollout:
    """Answers to the chosen prompts, the same on every rank."""
    tokens = [prompts.tokens(index) for index in chosen]
    answers = answer_all(
        roles, tokens, end_ids, config, devices, step=step, temperature=config.sampling.temperature
    )
    texts = [one.text(roles.tokenizer) for one in answers]
    return Rollout([prompts.prompt(index) for index in chosen], tokens, answers, texts)
