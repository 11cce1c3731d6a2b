"""The numbers of PPO, over answers packed end to end.

Sources: PPO, arXiv 1707.06347; GAE, arXiv 1506.02438; k1, k2, k3: J. Schulman, "Approximating KL Divergence" (2020);
their use in the training of a language model: InternLM2, arXiv 2403.17297, 4.2.3.
Shapes: N answer tokens, A answers, L tokens of the longest. `borders`, A + 1 numbers from 0 to N, say where answers
begin and end; an answer may have no tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tuner.losses.moments import EPSILON, MomentSums


def kl_estimate(
    logprobs_N: torch.Tensor, reference_N: torch.Tensor, kind: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """KL(policy ‖ reference) as estimated at tokens the policy drew, fp32 [N], with d = logprob − reference.

    k1 = d: unbiased, and negative at times. k2 = d² / 2: never negative, biased. k3 = exp(−d) − 1 + d: never
    negative, unbiased.
    """
    lead_N = logprobs_N.float() - reference_N.float()
    if kind == "k1":
        return lead_N
    if kind == "k2":
        return lead_N.square() / 2
    if kind == "k3":
        return torch.expm1(-lead_N) + lead_N
    raise ValueError(f"no estimator {kind!r} of the KL divergence; there are k1, k2 and k3")


def token_rewards(
    scores_A: torch.Tensor, kl_N: torch.Tensor, borders: Sequence[int], coefficient: float
) -> torch.Tensor:
    """−coefficient · kl_t at every token, and the answer's score added on its last one; fp32 [N].

    An answer without tokens drops its score: nothing was done that it could be credited to.
    """
    _check(borders, len(kl_N))
    rewards_N = -coefficient * kl_N.float()
    answered = [answer for answer, (start, end) in enumerate(itertools.pairwise(borders)) if end > start]
    last = _last(borders, rewards_N.device)
    return rewards_N.index_add(0, last, scores_A.float()[answered])


@torch.no_grad()
def advantages(
    rewards_N: torch.Tensor, values_N: torch.Tensor, borders: Sequence[int], gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and the returns the critic learns, fp32 [N] each; not differentiable.

    Within each answer delta_t = r_t + gamma · V_{t+1} − V_t, with V = 0 after its last token;
    A_t = delta_t + gamma · lam · A_{t+1}; return_t = A_t + V_t.
    """
    _check(borders, len(values_N))
    values_N = values_N.float()
    next_N = torch.zeros_like(values_N)
    next_N[:-1] = values_N[1:]
    next_N[_last(borders, values_N.device)] = 0
    deltas_N = rewards_N.float() + gamma * next_N - values_N
    advantages_N = _discounted(deltas_N, borders, gamma * lam)
    return advantages_N, advantages_N + values_N


def whitened(values_N: torch.Tensor, moments: MomentSums) -> torch.Tensor:
    """(x − mean) / (standard deviation + 1e-8), fp32 [N], by the moments of the tokens of all ranks."""
    return ((values_N.double() - moments.mean) / (moments.std + EPSILON)).float()


def explained_variance(returns: MomentSums, residuals: MomentSums) -> float | None:
    """1 − Var(return − value) / Var(return): 1 of a perfect critic, 0 of one that knows but the mean.

    residuals: moments of return − value. None where the returns do not vary: there is nothing to explain.
    """
    return 1 - residuals.variance / returns.variance if returns.variance else None


@dataclass(frozen=True)
class PolicySums:
    """Sums over tokens, fp32 scalars; only the loss is differentiable."""

    loss: torch.Tensor
    ratio: torch.Tensor
    """Of the ratios: their mean is 1 before the first update from a rollout."""
    clipped: torch.Tensor
    """Tokens where the clip bites: they teach nothing, for they have gone far enough the way they should."""
    kl: torch.Tensor
    """k3 of KL(old ‖ new): how far the updates have gone from the policy that answered."""


def policy_loss(
    logprobs_N: torch.Tensor, old_N: torch.Tensor, advantages_N: torch.Tensor, clip: float
) -> PolicySums:
    """sum_t −min(ratio · A, clamp(ratio, 1 − clip, 1 + clip) · A) with ratio = exp(logprob − old), and measures."""
    advantages_N = advantages_N.float()
    lead_N = logprobs_N.float() - old_N.float()
    ratio_N = lead_N.exp()
    plain_N, held_N = ratio_N * advantages_N, ratio_N.clamp(1 - clip, 1 + clip) * advantages_N
    return PolicySums(
        loss=-torch.minimum(plain_N, held_N).sum(),
        ratio=ratio_N.detach().sum(),
        clipped=(held_N < plain_N).float().sum(),
        kl=kl_estimate(old_N, logprobs_N.detach(), "k3").sum(),
    )


def value_loss(
    values_N: torch.Tensor, returns_N: torch.Tensor, old_values_N: torch.Tensor, clip: float | None = None
) -> torch.Tensor:
    """sum_t ½ (V − R)², as a scalar in fp32; with `clip` ½ max((V − R)², (V_old + clamp(V − V_old, ±clip) − R)²)."""
    values_N, returns_N, old_values_N = values_N.float(), returns_N.float(), old_values_N.float()
    squares_N = (values_N - returns_N).square()
    if clip is not None:
        held_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
        squares_N = torch.maximum(squares_N, (held_N - returns_N).square())
    return squares_N.sum() / 2


def _discounted(deltas_N: torch.Tensor, borders: Sequence[int], discount: float) -> torch.Tensor:
    """sum_k discount^k · delta_{t+k} within each answer: one step per position, for all answers at once."""
    lengths = [end - start for start, end in itertools.pairwise(borders)]
    answers, device = len(lengths), deltas_N.device
    starts_A, lengths_A = torch.tensor([list(borders[:-1]), lengths], dtype=torch.long, device=device)
    numbers_A = torch.arange(answers, device=device)
    answer_N = numbers_A.repeat_interleave(lengths_A, output_size=len(deltas_N))
    position_N = torch.arange(len(deltas_N), device=device) - starts_A[answer_N]
    sums_LA = deltas_N.new_zeros(max(lengths, default=0), answers)  # zeros behind an answer's last token
    sums_LA[position_N, answer_N] = deltas_N
    for later_A, now_A in itertools.pairwise(reversed(sums_LA.unbind())):
        now_A.add_(later_A, alpha=discount)
    return sums_LA[position_N, answer_N]


def _last(borders: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where the last tokens of the answers stand that have any."""
    ends = [end - 1 for start, end in itertools.pairwise(borders) if end > start]
    return torch.tensor(ends, dtype=torch.long, device=device)


def _check(borders: Sequence[int], tokens: int) -> None:
    if not borders or borders[0] != 0 or borders[-1] != tokens:
        raise ValueError(f"the borders of the answers must run from 0 to their {tokens} tokens")
