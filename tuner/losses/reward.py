"""Losses of a reward model, as sums in fp32 (InternLM2, arXiv 2403.17297, 4.2.1).

Shapes: P pairs of answers, S answers.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

EDGE = 1e-3
"""Distance from its pole at which the log barrier is continued as a parabola, in units of the score."""


def ranking_loss(differences_P: torch.Tensor, weights_P: torch.Tensor, gamma: float = 0.0) -> torch.Tensor:
    """sum_p −weight_p · (1 − 2 max(0, P_p − ½))^γ · log P_p with P = σ(difference), as a scalar in fp32.

    differences_P: score of the better answer minus that of the worse, minus the margin. gamma 0 is the plain ranking
    loss (Bradley & Terry, 1952); a larger one gives less weight to correctly ranked pairs (focal: Lin et al., 2017).
    """
    differences_P = differences_P.float()
    # not log(sigmoid), which is −inf where the sigmoid underflows
    losses_P = -logsigmoid(differences_P)
    if gamma:
        # 1 − 2 max(0, P − ½) = 2 σ(−max(difference, 0)): keeps its digits where P rounds to 1;
        # computed as a logarithm, it keeps its gradient where σ rounds to 0.
        losses_P = (gamma * (math.log(2) + logsigmoid(-torch.relu(differences_P)))).exp() * losses_P
    return (losses_P * weights_P).sum()


def log_barrier(scores_S: torch.Tensor, weights_S: torch.Tensor, bound: float = 5.0) -> torch.Tensor:
    """sum_s weight_s · −(log(bound + x) + log(bound − x)), as a scalar in fp32.

    From |x| = bound − EDGE outwards it is continued by the parabola with the same value, slope and curvature, so a
    score outside the bounds is pushed back harder the farther out it is; clamping would leave it without a gradient.
    """
    size_S = scores_S.float().abs()
    inside_S = size_S.clamp(max=bound - EDGE)
    outside_S = size_S - inside_S
    slope = 1 / EDGE - 1 / (2 * bound - EDGE)
    curvature = 1 / EDGE**2 + 1 / (2 * bound - EDGE) ** 2
    barrier_S = -(torch.log(bound + inside_S) + torch.log(bound - inside_S))
    return ((barrier_S + slope * outside_S + curvature / 2 * outside_S**2) * weights_S).sum()


def square_penalty(scores_S: torch.Tensor, weights_S: torch.Tensor) -> torch.Tensor:
    """sum_s weight_s · x², as a scalar in fp32."""
    return (scores_S.float() ** 2 * weights_S).sum()
