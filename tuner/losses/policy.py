"""The arithmetic of PPO, GRPO and RLOO, over answers packed end to end.

Sources: PPO, arXiv 1707.06347; GAE, arXiv 1506.02438; GRPO, arXiv 2402.03300; RLOO, arXiv 2402.14740; k1, k2, k3:
J. Schulman, "Approximating KL Divergence" (2020); PPO for language models: InternLM2, arXiv 2403.17297, 4.2.3;
truncated importance weights: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
(2025).
Shapes: N answer tokens, A answers, L tokens of the longest answer, G groups of S answers to one prompt. `borders`,
A + 1 numbers from 0 to N, are where the answers begin and end; an answer may have no tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tuner.losses.moments import EPSILON, MomentSums

GROUP_EPSILON = 1e-4
"""Added to the standard deviation of a group's scores before dividing by it.

arXiv 2402.03300 has none, but a group whose scores are all equal has a standard deviation of 0. The value is TRL's, so
that advantages are the same as there; EPSILON would let rounding in nearly equal scores grow to advantages of size 1.
"""

ADAPTIVE_LIMIT = 0.2
"""Largest relative error from the KL target that the coefficient answers to (arXiv 1909.08593, 2.2)."""


def kl_estimate(
    logprobs_N: torch.Tensor, reference_N: torch.Tensor, kind: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """KL(policy ‖ reference) estimated at tokens that the policy sampled, fp32 [N], in nats; d = logprob − reference.

    k1 = d: unbiased, sometimes negative. k2 = d² / 2: never negative, biased. k3 = exp(−d) − 1 + d: never
    negative, unbiased. Unbiased where tokens are sampled from the very distribution that log-probabilities are of;
    under top_p, top_k or a minimum length they are not, and none of the three averages to the divergence.
    """
    log_ratio_N = logprobs_N.float() - reference_N.float()
    if kind == "k1":
        return log_ratio_N
    if kind == "k2":
        return log_ratio_N.square() / 2
    if kind == "k3":
        # expm1: near 0, where the policy stays, exp(−d) − 1 would lose all its digits
        return torch.expm1(-log_ratio_N) + log_ratio_N
    raise ValueError(f"no estimator {kind!r} of the KL divergence; there are k1, k2 and k3")


def adapted_coefficient(coefficient: float, kl: float, target: float, step: float) -> float:
    """The KL coefficient after a step: coefficient · (1 + clip(KL / target − 1, ±0.2) · step).

    Ziegler et al. (arXiv 1909.08593, 2.2), as in TRL up to 0.11. kl, target: mean divergence of the step's answers from
    the reference, and the one to hold, in nats an answer. step: the step's answers over the horizon, at most 1. A KL
    that is no number leaves the coefficient as it is.
    """
    if not math.isfinite(kl):
        return coefficient
    error = min(max(kl / target - 1, -ADAPTIVE_LIMIT), ADAPTIVE_LIMIT)
    return coefficient * (1 + error * step)


def token_rewards(
    scores_A: torch.Tensor, kl_N: torch.Tensor, borders: Sequence[int], coefficient: float
) -> torch.Tensor:
    """−coefficient · kl_t at every token, plus the answer's score at its last token; fp32 [N].

    The score of an answer without tokens is dropped: there is no action to credit.
    """
    _check(borders, len(kl_N))
    rewards_N = -coefficient * kl_N.float()
    nonempty = [answer for answer, (start, end) in enumerate(itertools.pairwise(borders)) if end > start]
    last = _last(borders, rewards_N.device)
    return rewards_N.index_add(0, last, scores_A.float()[nonempty])


@torch.no_grad()
def advantages(
    rewards_N: torch.Tensor, values_N: torch.Tensor, borders: Sequence[int], gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimates, and the returns that the critic fits, fp32 [N] each; not differentiable.

    Within each answer delta_t = r_t + gamma · V_{t+1} − V_t, with V = 0 after its last token;
    A_t = delta_t + gamma · lam · A_{t+1}; return_t = A_t + V_t.
    """
    _check(borders, len(values_N))
    values_N = values_N.float()
    next_N = torch.zeros_like(values_N)
    next_N[:-1] = values_N[1:]
    # or the first value of the next answer in the pack would be bootstrapped from
    next_N[_last(borders, values_N.device)] = 0
    deltas_N = rewards_N.float() + gamma * next_N - values_N
    advantages_N = _discounted(deltas_N, borders, gamma * lam)
    return advantages_N, advantages_N + values_N


def whitened(values_N: torch.Tensor, moments: MomentSums) -> torch.Tensor:
    """(x − mean) / (standard deviation + 1e-8), fp32 [N], by the moments of the tokens of all ranks."""
    return ((values_N.double() - moments.mean) / (moments.std + EPSILON)).float()


def explained_variance(returns: MomentSums, residuals: MomentSums) -> float | None:
    """1 − Var(return − value) / Var(return): 1 for a perfect critic, 0 for a constant one.

    residuals: moments of return − value. None where the returns do not vary.
    """
    return 1 - residuals.variance / returns.variance if returns.variance else None


def group_advantages(scores_A: np.ndarray, size: int, scale: bool) -> np.ndarray:
    """GRPO's advantages (arXiv 2402.03300, 4.1.2), float64 [A]: each score minus the mean of its group.

    Groups are `size` consecutive answers to one prompt. scale: divided by the group's sample standard deviation + 1e-4,
    as TRL does. Raises ValueError where the answers are not whole groups of two or more.
    """
    scores_GS = _groups(scores_A, size)
    advantages_GS = scores_GS - scores_GS.mean(1, keepdims=True)
    if scale:
        advantages_GS = advantages_GS / (scores_GS.std(1, ddof=1, keepdims=True) + GROUP_EPSILON)
    return advantages_GS.reshape(-1)


def leave_one_out(rewards_A: np.ndarray, size: int) -> np.ndarray:
    """RLOO's advantages (arXiv 2402.14740, 3.3), float64 [A]: each reward minus the mean of the others in its group.

    Groups are `size` consecutive answers to one prompt. Raises ValueError where the answers are not whole groups of
    two or more.
    """
    rewards_GS = _groups(rewards_A, size)
    others_GS = (rewards_GS.sum(1, keepdims=True) - rewards_GS) / (size - 1)
    return (rewards_GS - others_GS).reshape(-1)


@dataclass(frozen=True)
class PolicySums:
    """Sums over tokens (of `answer_policy_loss`: over answers), fp32 scalars; only the loss is differentiable."""

    loss: torch.Tensor
    ratio: torch.Tensor
    """Of the probability ratios new / old: their mean is 1 before the first update from a rollout."""
    clipped: torch.Tensor
    """Tokens, or answers, whose gradient the clip sets to 0, since their ratio is past the bound they are pushed to."""
    kl: torch.Tensor
    """k3 estimates of KL(old ‖ new), in nats: how far the updates have moved from the policy that answered."""


def policy_loss(
    logprobs_N: torch.Tensor,
    old_N: torch.Tensor,
    advantages_N: torch.Tensor,
    clip: float,
    clip_high: float | None = None,
    weights_N: torch.Tensor | None = None,
) -> PolicySums:
    """sum_t −weight_t · min(ratio · A, clamp(ratio, 1 − clip, 1 + clip_high) · A) with ratio = exp(logprob − old).

    clip_high: `clip` where None; a larger one is DAPO's asymmetric clip (arXiv 2503.14476, 3.1). weights_N: of the
    tokens in the loss alone, 1 where None; 1 / length of the token's answer makes it a sum of answers' means. The
    measures are per token, unweighted.
    """
    return _clipped_surrogate(logprobs_N, old_N, advantages_N, (clip, clip_high), weights_N)


def answer_policy_loss(
    logprobs_N: torch.Tensor,
    old_N: torch.Tensor,
    advantages_A: torch.Tensor,
    borders: Sequence[int],
    clip: float,
    weights_A: torch.Tensor | None = None,
) -> PolicySums:
    """The same surrogate for whole answers: sum_a −weight_a · min(ratio_a · A_a, clamp(ratio_a, 1 ± clip) · A_a).

    ratio_a = exp(sum of the answer's logprobs − sum of the old ones), as in RLOO (arXiv 2402.14740), where an answer
    is one action. All sums are over answers: `ratio` and `clipped` of answers, and `kl` is k3 of the answers'
    log-probabilities, so each mean is per answer. An answer without tokens has ratio 1. weights_A: of the answers in
    the loss alone, 1 where None.
    """
    _check(borders, len(logprobs_N))
    return _clipped_surrogate(
        _answer_sums(logprobs_N, borders), _answer_sums(old_N, borders), advantages_A, (clip, None), weights_A
    )


def truncated_weights(old_N: torch.Tensor, sampled_N: torch.Tensor, largest: float) -> torch.Tensor:
    """min(exp(old − sampled), largest) for each token, fp32 [N]; not differentiable.

    Yao et al. (2025): an engine of another implementation samples from π_sampled, not from the π_old that the trainer
    computes with the same weights. The policy gradient is an expectation over the sampler's tokens, so each token's
    clipped surrogate, whose ratio stays new / old, is multiplied by π_old / π_sampled. Truncated, a token that the
    sampler gave almost no probability cannot have the step for itself.
    """
    return (old_N.float() - sampled_N.float()).exp().clamp(max=largest).detach()


def truncated_answer_weights(
    old_N: torch.Tensor, sampled_N: torch.Tensor, borders: Sequence[int], largest: float
) -> torch.Tensor:
    """The same for whole answers, fp32 [A]: an answer's probability is the product of its tokens'."""
    return truncated_weights(_answer_sums(old_N, borders), _answer_sums(sampled_N, borders), largest)


def value_loss(
    values_N: torch.Tensor, returns_N: torch.Tensor, old_values_N: torch.Tensor, clip: float | None = None
) -> torch.Tensor:
    """sum_t ½ (V − R)², as a scalar in fp32; with `clip` ½ max((V − R)², (V_old + clamp(V − V_old, ±clip) − R)²)."""
    values_N, returns_N, old_values_N = values_N.float(), returns_N.float(), old_values_N.float()
    squares_N = (values_N - returns_N).square()
    if clip is not None:
        clipped_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
        squares_N = torch.maximum(squares_N, (clipped_N - returns_N).square())
    return squares_N.sum() / 2


def _clipped_surrogate(
    logprobs_X: torch.Tensor,
    old_X: torch.Tensor,
    advantages_X: torch.Tensor,
    clip: tuple[float, float | None],
    weights_X: torch.Tensor | None = None,
) -> PolicySums:
    """PPO's clipped surrogate of X actions, tokens or whole answers; clip: below 1, and above it (None: the same)."""
    low, high = clip
    advantages_X = advantages_X.float()
    # the exponential of a difference: probabilities themselves underflow, of whole answers soonest
    log_ratio_X = logprobs_X.float() - old_X.float()
    ratio_X = log_ratio_X.exp()
    clipped_ratio_X = ratio_X.clamp(1 - low, 1 + (low if high is None else high))
    plain_X, clipped_X = ratio_X * advantages_X, clipped_ratio_X * advantages_X
    surrogate_X = torch.minimum(plain_X, clipped_X)
    return PolicySums(
        loss=-(surrogate_X if weights_X is None else surrogate_X * weights_X.float()).sum(),
        ratio=ratio_X.detach().sum(),
        clipped=(clipped_X < plain_X).float().sum(),
        kl=kl_estimate(old_X, logprobs_X.detach(), "k3").sum(),
    )


def _answer_sums(values_N: torch.Tensor, borders: Sequence[int]) -> torch.Tensor:
    """Sum over each answer's tokens, fp32 [A]."""
    lengths = [end - start for start, end in itertools.pairwise(borders)]
    lengths_A = torch.tensor(lengths, dtype=torch.long, device=values_N.device)
    # output_size: without it, repeat_interleave waits for the device to learn the size
    answer_N = torch.arange(len(lengths), device=values_N.device).repeat_interleave(
        lengths_A, output_size=len(values_N)
    )
    sums_A = torch.zeros(len(lengths), dtype=torch.float32, device=values_N.device)
    return sums_A.index_add(0, answer_N, values_N.float())


def _groups(values_A: np.ndarray, size: int) -> np.ndarray:
    if size < 2 or len(values_A) % size:
        raise ValueError(f"{len(values_A)} answers are not whole groups of {size}; a group has two or more")
    return np.asarray(values_A, np.float64).reshape(-1, size)


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
    """Position of the last token of each answer that has tokens."""
    ends = [end - 1 for start, end in itertools.pairwise(borders) if end > start]
    return torch.tensor(ends, dtype=torch.long, device=device)


def _check(borders: Sequence[int], tokens: int) -> None:
    if not borders or borders[0] != 0 or borders[-1] != tokens:
        raise ValueError(f"the borders of the answers must run from 0 to their {tokens} tokens")
