"""What a packed row of answers costs a reward model, and what it gets right."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tuner.config import FocalRanking
from tuner.data.batch import Batch
from tuner.losses.reward import log_barrier, ranking_loss, square_penalty


@dataclass(frozen=True)
class PairSums:
    """Sums over the pairs and answers of a packed row, fp32 scalars; the first two are learned from."""

    ranking: torch.Tensor
    """Ranking losses, by the pairs' weights."""
    penalty: torch.Tensor
    """Penalties of the answers by their weights, times the penalty's own."""
    right: torch.Tensor
    """Weights of the pairs whose better answer scores higher; a tie counts half."""
    lead: torch.Tensor
    """Better score less worse, by the pairs' weights."""
    score: torch.Tensor
    """Scores of the answers, by their weights."""


def compare(scores_S: torch.Tensor, batch: Batch, loss: FocalRanking) -> PairSums:
    """Losses and measures of the scores of a row's segments. Raises ValueError where nothing is compared."""
    pairs = batch.pairs
    if pairs is None:
        raise ValueError("this batch has no pairs to compare: it is of another kind of data")
    leads_P = scores_S[pairs.better_P] - scores_S[pairs.worse_P]
    weights_S = batch.weights_N  # the learned token of a segment is the one its score is read at
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
