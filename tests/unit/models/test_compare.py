"""What packed rows of answers cost: by hand, and the same however they are packed."""

import math

import numpy as np
import pytest
import torch

from tests.unit.data.test_comparisons import comparisons
from tuner.config import FocalRanking
from tuner.data.batch import gather, make_batch, pack_all
from tuner.models.pair_sums import PairSums, pair_sums


def row(*ranks: int, weight: float = 1.0, margin: float = 0.0):
    """One row of answers of two tokens each, as a batch."""
    return gather(comparisons([ranks], weights=[weight], margins=[margin], ties=True), [0])


def barrier(score: float) -> float:
    return -math.log(5 + score) - math.log(5 - score)


def focal(lead: float) -> float:
    probability = 1 / (1 + math.exp(-lead))
    return -((1 - 2 * max(0.0, probability - 0.5)) ** 2) * math.log(probability)


def test_a_pair_by_hand():
    sums = pair_sums(torch.tensor([1.5, 0.5]), row(0, 1, weight=2.0), FocalRanking())
    assert sums.ranking.item() == pytest.approx(2 * focal(1.0), rel=1e-6)
    assert sums.penalty.item() == pytest.approx(0.02 * 2 * (barrier(1.5) + barrier(0.5)), rel=1e-6)
    assert sums.right.item() == 2.0
    assert sums.lead.item() == 2.0
    assert sums.score.item() == 4.0


def test_a_list_counts_each_pair_once_and_each_answer_once():
    scores = torch.tensor([2.0, 1.0, -1.0])
    sums = pair_sums(scores, row(0, 1, 2), FocalRanking(barrier=1.0, penalty="square", gamma=0.0))
    plain = [math.log1p(math.exp(-lead)) for lead in (1.0, 3.0, 2.0)]
    assert sums.ranking.item() == pytest.approx(sum(plain) / 3, rel=1e-6)
    assert sums.penalty.item() == pytest.approx(4 + 1 + 1)
    assert sums.lead.item() == pytest.approx(2.0)


def test_the_margin_is_what_the_better_must_lead_by():
    scores, batch = torch.tensor([1.5, 0.5]), row(0, 1, margin=0.75)
    assert pair_sums(scores, batch, FocalRanking()).ranking.item() == pytest.approx(focal(0.25), rel=1e-6)
    doubled = pair_sums(scores, batch, FocalRanking(margin=2.0))
    assert doubled.ranking.item() == pytest.approx(focal(-0.5), rel=1e-6)
    assert doubled.right.item() == 1.0  # what is right does not hang on the margin
    ignored = pair_sums(scores, batch, FocalRanking(margin=0.0))
    assert ignored.ranking.item() == pytest.approx(focal(1.0), rel=1e-6)


def test_every_field_of_the_loss_changes_it():
    scores, batch = torch.tensor([4.0, 1.0]), row(0, 1, margin=0.5)
    plain = pair_sums(scores, batch, FocalRanking())
    for change in (
        {"gamma": 1.0},
        {"penalty": "square"},
        {"bound": 7.0},
        {"barrier": 0.5},
        {"margin": 3.0},
    ):
        other = pair_sums(scores, batch, FocalRanking(**change))
        assert (other.ranking.item(), other.penalty.item()) != (plain.ranking.item(), plain.penalty.item())
    assert pair_sums(scores, batch, FocalRanking(barrier=0.0)).penalty.item() == 0


def test_equal_scores_are_half_right_and_wrong_ones_not():
    assert pair_sums(torch.tensor([1.0, 1.0]), row(0, 1), FocalRanking()).right.item() == 0.5
    assert pair_sums(torch.tensor([0.0, 1.0]), row(0, 1), FocalRanking()).right.item() == 0.0
    assert (
        pair_sums(torch.tensor([0.0, 1.0]), row(0, 0), FocalRanking()).right.item() == 0.5
    )  # a tie, each way


def test_gradients_push_the_better_up_and_all_inwards():
    scores = torch.tensor([0.2, 0.1, 9.0, -9.0], requires_grad=True)
    batch = gather(comparisons([(0, 1), (0, 1)]), [0, 1])
    sums = pair_sums(scores, batch, FocalRanking(barrier=0.0))
    (sums.ranking + sums.penalty).backward()
    assert scores.grad is not None
    assert scores.grad[0] < 0 < scores.grad[1]
    scores.grad = None
    sums = pair_sums(scores, batch, FocalRanking())
    (sums.ranking + sums.penalty).backward()
    assert scores.grad[2] > 0 > scores.grad[3]
    assert scores.grad.isfinite().all()


def test_measures_are_not_learned_from():
    scores = torch.tensor([0.2, 0.1], requires_grad=True)
    sums = pair_sums(scores, row(0, 1), FocalRanking())
    assert [getattr(sums, name).requires_grad for name in ("right", "lead", "score")] == [False] * 3
    assert sums.ranking.requires_grad
    assert sums.penalty.requires_grad


@pytest.mark.parametrize("tokens_per_pass", [12, 20, 64, 1000])
def test_sums_are_the_same_however_rows_are_packed(tokens_per_pass):
    generator = np.random.default_rng(0)
    ranks = [tuple(sorted(generator.integers(0, 3, generator.integers(2, 5)))) for _ in range(40)]
    ranks = [pair if pair[0] != pair[-1] else (0, 1) for pair in ranks]
    rows = comparisons(ranks, weights=generator.uniform(0.1, 3, 40), margins=generator.uniform(0, 1, 40))
    loss = FocalRanking()

    def sums(batches) -> torch.Tensor:
        return torch.stack([_values(pair_sums(_scores(batch), batch, loss)) for batch in batches]).sum(0)

    one_by_one = sums([gather(rows, [index]) for index in range(40)])
    packed = sums([gather(rows, group) for group in pack_all(rows.lengths, tokens_per_pass)])
    torch.testing.assert_close(packed, one_by_one, rtol=1e-5, atol=1e-5)


def test_an_empty_pass_adds_nothing_to_any_sum_or_gradient():
    rows = comparisons([(0, 1), (0, 1)])
    batch = gather(rows, ())
    scores = torch.full((len(batch.borders) - 1,), 0.3, requires_grad=True)
    assert _values(pair_sums(scores, batch, FocalRanking())).abs().max() == 0
    sums = pair_sums(scores, batch, FocalRanking())
    (sums.ranking + sums.penalty).backward()
    assert scores.grad is not None
    assert not scores.grad.any()


def test_a_batch_of_another_kind_is_refused():
    plain = make_batch([(np.arange(3, dtype=np.int32), np.ones(3, dtype=np.float32))])
    with pytest.raises(ValueError, match="no pairs to compare"):
        pair_sums(torch.zeros(1), plain, FocalRanking())


def _scores(batch) -> torch.Tensor:
    """A score that hangs on a segment's tokens alone."""
    return torch.stack(
        [
            batch.tokens_T[begin:end].float().sum().sin() * 3
            for begin, end in zip(batch.borders, batch.borders[1:], strict=False)
        ]
    )


def _values(sums: PairSums) -> torch.Tensor:
    return torch.stack([sums.ranking, sums.penalty, sums.right, sums.lead, sums.score]).detach()
