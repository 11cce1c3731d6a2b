"""The losses of a reward model, as sums in fp32 (InternLM2, arXiv 2403.17297, 4.2.1).

Shapes: P pairs of answers, S answers.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

EDGE = 1e-3
"""How far before its pole the log barrier goes on as a parabola."""


def ranking_loss(leads_P: torch.Tensor, weights_P: torch.Tensor, gamma: float = 0.0) -> torch.Tensor:
    """sum_p −weight_p · (1 − 2 max(0, P_p − ½))^γ · log P_p with P = σ(lead), as a scalar in fp32.

    leads_P: score of the better answer less that of the worse, less the margin. gamma 0 is the plain ranking
    loss (Bradley & Terry, 1952); with more, pairs that are right already count less (focal: Lin et al., 2017).
    """
    leads_P = leads_P.float()
    losses_P = -logsigmoid(leads_P)
    if gamma:
        # 1 − 2 max(0, P − ½) = 2 σ(−max(lead, 0)): keeps its digits where P rounds to 1, and as a logarithm its
        # gradient where σ rounds to 0
        losses_P = (gamma * (math.log(2) + logsigmoid(-torch.relu(leads_P)))).exp() * losses_P
    return (losses_P * weights_P).sum()


def log_barrier(scores_S: torch.Tensor, weights_S: torch.Tensor, bound: float = 5.0) -> torch.Tensor:
    """sum_s weight_s · −(log(bound + x) + log(bound − x)), as a scalar in fp32.

    From |x| = bound − EDGE outwards it goes on as the parabola with the same value, slope and curvature: a score
    that has left the bounds is pushed back, the harder the farther it is. (Clamped instead, it would feel nothing.)
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
