"""What is known of every answer token of a packed row, growing over a step: Observed, Rewarded, Experience.

Shapes: A answers of the rollout, S answers of a row, N answer tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tuner.losses.policy import kl_estimate, token_rewards
from tuner.models.forward import token_logprobs
from tuner.models.roles import Roles
from tuner.rollout.rollout import Row
from tuner.training.devices import Devices


@dataclass(frozen=True, eq=False)
class Observed:
    """A packed row of answers, with what the models say of each of its tokens; all fp32 [N]."""

    row: Row
    old_N: torch.Tensor
    """Log-probabilities under the policy that answered."""
    reference_N: torch.Tensor | None
    """Log-probabilities under the reference policy; None where no reference is held."""
    entropies_N: torch.Tensor
    """Entropy of the distribution each token was drawn from, in nats."""


@dataclass(frozen=True, eq=False)
class Rewarded(Observed):
    """An observed row with the reward of each token, fp32 [N]."""

    rewards_N: torch.Tensor


@dataclass(frozen=True, eq=False)
class Experience(Rewarded):
    """A rewarded row with the advantage of each token, fp32 [N]: what the policy is trained on."""

    advantages_N: torch.Tensor


def observe(roles: Roles, rows: Sequence[Row], temperature: float) -> list[Observed]:
    """Log-probabilities of the rows' answers under policy and, where there is one, reference.

    By the engine that trains, never by the one that generates: their rounding differs, and so would the ratio.
    """
    with roles.role("policy") as model:
        old = [token_logprobs(model, row.batch, temperature, entropy=True) for row in rows]
    reference: Sequence[torch.Tensor | None] = [None] * len(rows)
    if "reference" in roles:
        with roles.role("reference") as model:
            reference = [token_logprobs(model, row.batch, temperature)[0] for row in rows]
    return [
        Observed(row, old_N, reference_N, _present(entropies_N))
        for row, (old_N, entropies_N), reference_N in zip(rows, old, reference, strict=True)
    ]


def token_reward_of(
    observed: Observed, shaped_A: np.ndarray, kl: float, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """The KL penalty at every token and each answer's shaped score at its last one, fp32 [N].

    kl: the penalty coefficient, per nat; 0 without a reference.
    """
    row = observed.row
    if observed.reference_N is None:
        kl_N = torch.zeros_like(observed.old_N)
    else:
        kl_N = kl_estimate(observed.old_N, observed.reference_N, estimator)
    scores_S = torch.from_numpy(shaped_A[row.answers]).to(kl_N)
    return token_rewards(scores_S, kl_N, row.borders, kl)


def answer_rewards(rewarded: Sequence[Rewarded], num_answers: int, devices: Devices) -> np.ndarray:
    """Summed token rewards of every answer of the rollout, float64 [A], the same on every rank."""
    own: list[tuple[int, float]] = []
    for item in rewarded:
        cumulated = np.concatenate([[0.0], item.rewards_N.double().cpu().numpy().cumsum()])
        sums = np.diff(cumulated[list(item.row.borders)]).tolist()
        own += zip(item.row.answers.tolist(), sums, strict=True)
    rewards_A = np.zeros(num_answers)
    for answer, reward in devices.gather(own):
        rewards_A[answer] = reward
    return rewards_A


def spread_over_tokens(values_S: np.ndarray, row: Row) -> torch.Tensor:
    """A value of each answer of a row for each of its tokens, fp32 [N], on the row's device."""
    values_N = np.repeat(values_S.astype(np.float32), np.diff(row.borders))
    return torch.from_numpy(values_N).to(row.batch.tokens_T.device)


def _present(values_N: torch.Tensor | None) -> torch.Tensor:
    assert values_N is not None
    return values_N
