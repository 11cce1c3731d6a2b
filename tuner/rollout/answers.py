"""Part 1 of a step: the policy answers its prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tuner.config import PPO
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
    sampling, tokens = config.sampling, [prompts.tokens(index) for index in chosen]

    def answer(places: list[int]) -> list[Answer]:
        with roles.role("policy") as model:
            return generate(
                model,
                [tokens[place].tolist() for place in places],
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                end_ids=end_ids,
                noise=uniforms(config.seed, step, places, sampling.max_new_tokens),
                cache_bytes=int(sampling.cache_gib * 2**30),
                tokens_per_pass=config.tokens_per_pass,
            )

    answers = devices.share_out(len(chosen), answer)
    texts = [one.text(roles.tokenizer) for one in answers]
    return Rollout([prompts.prompt(index) for index in chosen], tokens, answers, texts)
