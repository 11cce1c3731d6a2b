"""Prompts answered and answers scored by all ranks together: of PPO's rollouts and of its held-out prompts alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from tuner.config import PPO
from tuner.data.conversation import Prompt
from tuner.models.generate import Answer, generate, uniforms
from tuner.models.roles import Roles
from tuner.models.scorer import RewardInputs, ScoreRequest, score_sequences
from tuner.training.devices import Devices


def answer_all(
    roles: Roles,
    prompts: Sequence[np.ndarray],
    end_ids: Collection[int],
    config: PPO,
    devices: Devices,
    *,
    step: int,
    temperature: float,
) -> list[Answer]:
    """The policy's answer to each prompt (tokens, int32), the same on every rank, each having generated its share.

    The noise of an answer, where there is any, is a function of (seed, step, its place, position): how prompts are
    batched and dealt, and a kill before a step is over, change nothing of it.
    """
    sampling = config.sampling

    def answer(places: list[int]) -> list[Answer]:
        with roles.role("policy") as model:
            return generate(
                model,
                [prompts[place].tolist() for place in places],
                max_new_tokens=sampling.max_new_tokens,
                temperature=temperature,
                top_p=sampling.top_p,
                end_ids=end_ids,
                noise=uniforms(config.seed, step, places, sampling.max_new_tokens) if temperature else None,
                cache_bytes=int(sampling.cache_gib * 2**30),
                tokens_per_pass=config.tokens_per_pass,
            )

    return devices.share_out(len(prompts), answer)


def score_all(
    roles: Roles,
    sequences: RewardInputs,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    tokens_per_pass: int,
    devices: Devices,
) -> np.ndarray:
    """The reward model's score of every answer under its prompt's condition, float64 [A]; the same on every rank.

    Answers go through their text, whatever the two models' tokenizers: it is what `tuner score` says of them.
    """

    def score(places: list[int]) -> list[float]:
        made = sequences.make([ScoreRequest.of(prompts[place], texts[place]) for place in places])
        with roles.role("reward") as model:
            return score_sequences(model, made, tokens_per_pass, devices.device).tolist()

    return np.array(devices.share_out(len(texts), score))
