"""Parts 2, 4 and 5 of a step: log-probabilities and values, rewards, and advantages of every answer token.

Shapes: A answers of the rollout, N answer tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from tuner.config import PPO
from tuner.losses.moments import MomentSums
from tuner.losses.policy import advantages, kl_estimate, token_rewards, whitened
from tuner.models.forward import token_logprobs, values
from tuner.models.roles import Roles
from tuner.rollout.rollout import Row
from tuner.training.devices import Devices


@dataclass(frozen=True, eq=False)
class Observed:
    """A packed row of answers, with what the models say of each of their N tokens; all fp32 [N]."""

    row: Row
    old_N: torch.Tensor
    """Log-probabilities of the policy before it learns from them."""
    reference_N: torch.Tensor
    values_N: torch.Tensor
    """What the critic expects from before each token to the answer's end."""
    entropies_N: torch.Tensor


@dataclass(frozen=True, eq=False)
class Rewarded(Observed):
    """The same with what each token earned."""

    rewards_N: torch.Tensor


@dataclass(frozen=True, eq=False)
class Experience(Rewarded):
    """The same with what is learned from each token."""

    advantages_N: torch.Tensor
    returns_N: torch.Tensor


def observe(roles: Roles, rows: Sequence[Row], temperature: float) -> list[Observed]:
    """Log-probabilities of policy and reference, and the critic's values, over the rows that are learned from.

    By the engine that trains, never by the one that generates: their rounding differs (and so would the ratio).
    """
    with roles.role("policy") as model:
        old = [token_logprobs(model, row.batch, temperature, entropy=True) for row in rows]
    with roles.role("reference") as model:
        reference = [token_logprobs(model, row.batch, temperature)[0] for row in rows]
    with roles.role("critic") as model:
        worth = [values(model, row.batch) for row in rows]
    return [
        Observed(row, old_N, reference_N, values_N, entropies_N)
        for row, (old_N, entropies_N), reference_N, values_N in zip(rows, old, reference, worth, strict=True)
    ]


def with_rewards(observed: Sequence[Observed], learned_A: np.ndarray, config: PPO) -> list[Rewarded]:
    """The price of leaving the reference at every token, and each answer's score at its last one."""
    made = []
    for one in observed:
        kl_N = kl_estimate(one.old_N, one.reference_N, config.kl_estimator)
        scores = torch.from_numpy(learned_A[one.row.answers]).to(kl_N)
        rewards_N = token_rewards(scores, kl_N, one.row.borders, config.kl)
        made.append(Rewarded(**vars(one), rewards_N=rewards_N))
    return made


def with_advantages(rewarded: Sequence[Rewarded], config: PPO, devices: Devices) -> list[Experience]:
    """How much better each token was than the critic expected, and what it is to expect (GAE)."""
    made = []
    for one in rewarded:
        advantages_N, returns_N = advantages(
            one.rewards_N, one.values_N, one.row.borders, config.gamma, config.gae_lambda
        )
        made.append(Experience(**vars(one), advantages_N=advantages_N, returns_N=returns_N))
    if not config.whiten_advantages:
        return made
    own = sum((MomentSums.of(one.advantages_N) for one in made), start=MomentSums(0, 0, 0))
    moments = MomentSums(**devices.sum(asdict(own)))  # of the tokens of all ranks
    return [replace(one, advantages_N=whitened(one.advantages_N, moments)) for one in made]
