"""Per-token values of a packed row, one class for each part of a step that adds some.

Observed (log-probabilities) -> Rewarded (rewards) -> Experience (advantages). Values are on answer tokens only.

Shapes: A answers of the rollout, S answers of a row, N answer tokens of a row.
"""

# torch annotates some of its functions only in part
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np
import torch

from tuner.losses.policy import kl_estimate, token_rewards
from tuner.models.forward import token_logprobs
from tuner.models.roles import Roles
from tuner.rollout.rollout import Row
from tuner.training.devices import Devices


@dataclass(frozen=True, eq=False)
class Observed:
    """A packed row with the log-probability and entropy of each answer token, fp32 [N] each."""

    row: Row
    old_N: torch.Tensor
    """Log-probabilities under the policy that sampled the answers, before any update of the step."""
    reference_N: torch.Tensor | None
    """Log-probabilities under the reference policy; None where the algorithm holds no reference."""
    entropies_N: torch.Tensor
    """Entropy of the distribution each token was sampled from, in nats."""
    sampled_N: torch.Tensor | None = field(default=None, kw_only=True)
    """Log-probabilities under the engine that sampled the answers, where losses correct for their difference from
    `old_N`; None: they do not."""


@dataclass(frozen=True, eq=False)
class Rewarded(Observed):
    """An observed row with the reward of each token, fp32 [N]."""

    rewards_N: torch.Tensor


@dataclass(frozen=True, eq=False)
class Experience(Rewarded):
    """A rewarded row with the advantage of each token, fp32 [N]; the policy loss is taken on it."""

    advantages_N: torch.Tensor


AnyObserved = TypeVar("AnyObserved", bound=Observed)


def of_learned(observed: AnyObserved) -> AnyObserved:
    """The values of the answers that losses are taken on; of all, the same object.

    Fields are cut by the shape that ends their name: _N by tokens, _S by answers.
    """
    row = observed.row
    if row.learned_S.all():
        return observed
    masks = {"N": row.learned_tokens, "S": torch.from_numpy(row.learned_S)}
    cut = {
        name: value[masks[name[-1]].to(value.device)]
        for name, value in vars(observed).items()
        if isinstance(value, torch.Tensor) and name[-2:] in ("_N", "_S")
    }
    return replace(observed, row=row.of_learned(), **cut)


def observe(roles: Roles, rows: Sequence[Row], temperature: float) -> list[Observed]:
    """Log-probabilities of the rows' answers under the policy and, if there is one, the reference.

    Computed by the training forward pass on the rows it will train on, although the generation engine has reported
    log-probabilities of its own: those differ by rounding (`generator_gap`), and the ratio of the first update would
    not be exactly 1. temperature: of sampling, since the ratio is between the distributions that were sampled from.
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


def row_rewards(
    observed: Observed, shaped_A: np.ndarray, kl: float, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """Token rewards of a row, fp32 [N]: the KL penalty at every token, the answer's shaped score at its last.

    shaped_A: of the whole rollout, float64. kl: KL penalty coefficient, in reward per nat; there is no penalty
    without a reference.
    """
    row = observed.row
    # at coefficient 0 an estimate that overflows would make 0 · inf = NaN of the reward
    if observed.reference_N is None or not kl:
        kl_N = torch.zeros_like(observed.old_N)
    else:
        kl_N = kl_estimate(observed.old_N, observed.reference_N, estimator)
    scores_S = torch.from_numpy(shaped_A[row.answers]).to(kl_N)
    return token_rewards(scores_S, kl_N, row.borders, kl)


def answer_rewards(rewarded: Sequence[Rewarded], num_answers: int, devices: Devices) -> np.ndarray:
    """Summed token rewards of each answer of the rollout, float64 [A], the same on every rank."""
    local: list[tuple[int, float]] = []
    for row in rewarded:
        lengths_S = np.diff(row.row.borders)
        answer_N = np.repeat(np.arange(len(lengths_S)), lengths_S)
        # each by itself: a difference of running sums would carry the NaN of one answer into the next
        sums_S = np.bincount(answer_N, row.rewards_N.double().cpu().numpy(), len(lengths_S))
        local += zip(row.row.answers.tolist(), sums_S.tolist(), strict=True)
    rewards_A = np.zeros(num_answers)
    for answer, reward in devices.gather(local):
        rewards_A[answer] = reward
    return rewards_A


def broadcast_to_tokens(values_S: np.ndarray, row: Row) -> torch.Tensor:
    """Repeat each answer's value over its tokens, fp32 [N], on the row's device."""
    values_N = np.repeat(values_S.astype(np.float32), np.diff(row.borders))
    return torch.from_numpy(values_N).to(row.batch.tokens_T.device)


def _present(values_N: torch.Tensor | None) -> torch.Tensor:
    assert values_N is not None
    return values_N
