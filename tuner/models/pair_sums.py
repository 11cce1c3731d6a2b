"""Losses and measures of a reward model over the pairs of a packed row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tuner.config import FocalRanking
from tuner.data.batch import Batch
from tuner.losses.reward import log_barrier, ranking_loss, square_penalty


@dataclass(frozen=True)
class PairSums:
    """Sums over the pairs and answers of a packed row, fp32 scalars; the first two make up the loss."""

    ranking: torch.Tensor
    """Ranking losses, weighted by the pairs' weights."""
    penalty: torch.Tensor
    """Penalties of the answers' scores, weighted by the answers' weights, times the penalty coefficient."""
    right: torch.Tensor
    """Weights of the correctly ranked pairs; a tie counts half."""
    lead: torch.Tensor
    """Score of the better answer minus that of the worse, weighted by the pairs' weights."""
    score: torch.Tensor
    """Scores, weighted by the answers' weights."""


def pair_sums(scores_S: torch.Tensor, batch: Batch, loss: FocalRanking) -> PairSums:
    """Sums over the pairs of a packed row from the scores of its segments, fp32 [S]. Raises ValueError where the batch
    has no pairs."""
    pairs = batch.pairs
    if pairs is None:
        raise ValueError("this batch has no pairs to compare: it is of another kind of data")
    leads_P = scores_S[pairs.better_P] - scores_S[pairs.worse_P]
    weights_S = batch.weights_N  # each segment has one weighted token, at which its score is read
    if loss.penalty == "log":
        penalty = log_barrier(scores_S, weights_S, loss.bound)
    else:
        penalty = square_penalty(scores_S, weights_S)
    return PairSums(
        ranking=ranking_loss(leads_P - loss.margin * pairs.margins_P, pairs.weights_P, loss.gamma),
        penalty=loss.barrier * penalty,
        right=((leads_P.detach().sign() + 1) / 2 * pairs.weights_P).sum(),
        lead=(leads_P.detach() * pairs.weights_P).sum(),
        score=(scores_S.detach() * weights_S).sum(),
    )
