"""Part 1 of a step: the policy answers its prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from tuner.config import PPO
from tuner.data.packing import deal
from tuner.data.prompts import PromptSet
from tuner.models.generate import Answer, generate, uniforms
from tuner.models.roles import Roles
from tuner.rollout.rollout import Rollout
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
    """Answers to the chosen prompts, the same on every rank, each rank having generated its share.

    The noise of an answer is a function of (seed, step, its place in the step, position): how prompts are batched
    and dealt, and a kill before the step is over, change nothing of it.
    """
    sampling = config.sampling
    tokens = [prompts.tokens(index) for index in chosen]
    own = deal(range(len(chosen)), devices.rank, devices.world)
    answered: list[tuple[int, Answer]] = []
    if own:
        with roles.role("policy") as model:
            answers = generate(
                model,
                [tokens[place].tolist() for place in own],
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                end_ids=end_ids,
                noise=uniforms(config.seed, step, own, sampling.max_new_tokens),
                cache_bytes=int(sampling.cache_gib * 2**30),
            )
        answered = list(zip(own, answers, strict=True))
    gathered = [answer for _, answer in sorted(devices.gather(answered), key=lambda pair: pair[0])]
    texts = [text_of(roles, answer.content) for answer in gathered]
    return Rollout([prompts.prompt(index) for index in chosen], tokens, gathered, texts)


def text_of(roles: Roles, tokens: np.ndarray) -> str:
    """An answer in words, special tokens included: what was said must not be hidden from who judges it."""
    return roles.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
