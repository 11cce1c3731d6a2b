"""The numbers of PPO by hand: every token once, no answer in another's, nothing read as missing that is 0."""

import itertools
import math
import time

import numpy as np
import pytest
import torch

from tuner.losses.moments import MomentSums
from tuner.losses.policy import (
    adapted_coefficient,
    advantages,
    answer_policy_loss,
    explained_variance,
    group_advantages,
    kl_estimate,
    leave_one_out,
    policy_loss,
    token_rewards,
    truncated_answer_weights,
    truncated_weights,
    value_loss,
    whitened,
)
from tuner.models.sampling import nucleus


def ragged(answers: int, longest: int, seed: int = 0) -> list[int]:
    """Borders of random answers, some without tokens, one the longest."""
    lengths = torch.randint(
        0, longest + 1, (answers,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    lengths[::7] = [0] * len(lengths[::7])
    lengths[-1] = longest
    return list(itertools.accumulate(lengths, initial=0))


def one_by_one(rewards, values, borders, gamma, lam):
    """GAE as the formula says it, token by token in fp64."""
    result = [0.0] * len(rewards)
    for start, end in itertools.pairwise(borders):
        for t in reversed(range(start, end)):
            last = t == end - 1
            delta = rewards[t] + (0.0 if last else gamma * values[t + 1]) - values[t]
            result[t] = delta + (0.0 if last else gamma * lam * result[t + 1])
    return result


@pytest.mark.parametrize(
    ("kind", "ahead", "behind"),
    [
        ("k1", math.log(2), -math.log(2)),
        ("k2", math.log(2) ** 2 / 2, math.log(2) ** 2 / 2),
        ("k3", 1 / 2 - 1 + math.log(2), 2 - 1 - math.log(2)),  # exp(−d) − 1 + d with d = ± ln 2
    ],
)
def test_estimators_of_the_divergence(kind, ahead, behind):
    """The policy gives the token twice the reference's probability, half of it, the same."""
    policy, reference = torch.tensor([0.5, 0.25, 0.3]).log(), torch.tensor([0.25, 0.5, 0.3]).log()
    assert kl_estimate(policy, reference, kind).tolist() == pytest.approx([ahead, behind, 0], abs=1e-7)


def test_the_divergence_is_what_the_estimators_average_to():
    """Σ p · k1 and Σ p · k3 are the divergence itself, k2's near it where the two distributions are close."""
    torch.manual_seed(0)
    policy = torch.randn(50).log_softmax(-1)
    reference = (policy + 0.1 * torch.randn(50)).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum().item()
    mean = {
        kind: (policy.exp() * kl_estimate(policy, reference, kind)).sum().item()
        for kind in ("k1", "k2", "k3")
    }
    assert mean["k1"] == pytest.approx(exact, rel=1e-4)
    assert mean["k3"] == pytest.approx(exact, rel=1e-3)
    assert mean["k2"] == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_no_estimator_is_unbiased_where_tokens_are_left_out_of_sampling(kind):
    """As the field's documentation says: by percents of the divergence."""
    torch.manual_seed(0)
    policy = torch.randn(50).log_softmax(-1)
    reference = (policy + 0.5 * torch.randn(50)).log_softmax(-1)
    inside = nucleus(policy.exp()[None], 0.9)[0]
    sampled = torch.where(inside, policy.exp(), 0)
    mean = (sampled / sampled.sum() * kl_estimate(policy, reference, kind)).sum().item()
    exact = (policy.exp() * (policy - reference)).sum().item()
    assert abs(mean - exact) > 0.02 * exact


def test_small_divergences_keep_their_digits():
    """k3 ≈ d² / 2 for small d, where 1 − 1 of fp32 would leave nothing of it."""
    lead = torch.tensor([1e-3, -1e-3])
    assert kl_estimate(lead, torch.zeros(2), "k3").tolist() == pytest.approx([5e-7, 5e-7], rel=0.2)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 0.5)),  # a tenth above
        (5.4, 0.2 * (1 - 0.1 * 0.5)),
        (60.0, 0.2 * (1 + 0.2 * 0.5)),  # far above: as a fifth above
        (-3.0, 0.2 * (1 - 0.2 * 0.5)),  # k1 of a few answers may be negative
        (math.nan, 0.2),
        (math.inf, 0.2),
    ],
)
def test_the_coefficient_follows_its_target(kl, expected):
    assert adapted_coefficient(0.2, kl, target=6.0, step=0.5) == pytest.approx(expected, rel=1e-12)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2 and k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def test_the_score_comes_on_the_last_token_of_its_answer():
    """Answers of 3, 0, 1 and 2 tokens: −½ · kl everywhere, the scores 1, (dropped), −2 and 4 at tokens 2, 3 and 5."""
    kl = torch.tensor([0.2, -0.4, 0.6, 1.0, 0.0, 2.0])
    found = token_rewards(torch.tensor([1.0, math.nan, -2.0, 4.0]), kl, [0, 3, 3, 4, 6], coefficient=0.5)
    assert found.tolist() == pytest.approx([-0.1, 0.2, 0.7, -2.5, 0.0, 3.0])


def test_an_answer_that_did_not_end_is_paid_at_its_last_token_like_any_other():
    """What it costs not to end is in its score; tokens are all the same to the sums."""
    found = token_rewards(torch.tensor([-1.5, 1.5]), torch.zeros(4), [0, 2, 4], coefficient=0.01)
    assert found.tolist() == [0, -1.5, 0, 1.5]


def test_a_score_of_zero_is_a_score():
    """A_0 = 0 − 0.3 + ½ · (0 − 0.8) + 0.8 with gamma 1 and lambda ½: as for any other score, less that score."""
    values, borders = torch.tensor([0.3, 0.8]), [0, 2]
    rewards = token_rewards(torch.tensor([0.0]), torch.zeros(2), borders, coefficient=0.0)
    assert rewards.tolist() == [0, 0]
    found, returns = advantages(rewards, values, borders, gamma=1.0, lam=0.5)
    assert found.tolist() == pytest.approx([0.8 - 0.3 + 0.5 * -0.8, -0.8])
    assert returns.tolist() == pytest.approx([0.4, 0.0])


def test_advantages_by_hand():
    """Answers of 3, 0 and 1 tokens, gamma 0.9, lambda 0.5.

    delta_0 = 1 + 0.9 · 2 − 1 = 1.8; delta_1 = 0 + 0.9 · 3 − 2 = 0.7; delta_2 = 4 − 3 = 1.
    A_2 = 1; A_1 = 0.7 + 0.45 · 1 = 1.15; A_0 = 1.8 + 0.45 · 1.15 = 2.3175. The other answer: A = 5 − 7 = −2.
    """
    rewards, values = torch.tensor([1.0, 0.0, 4.0, 5.0]), torch.tensor([1.0, 2.0, 3.0, 7.0])
    found, returns = advantages(rewards, values, [0, 3, 3, 4], gamma=0.9, lam=0.5)
    assert found.tolist() == pytest.approx([2.3175, 1.15, 1.0, -2.0])
    assert returns.tolist() == pytest.approx([3.3175, 3.15, 4.0, 5.0])


def test_lambda_zero_looks_one_token_ahead():
    rewards, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.25, 0.125])
    found, _ = advantages(rewards, values, [0, 3], gamma=0.5, lam=0.0)
    assert found.tolist() == pytest.approx([1 + 0.125 - 0.5, 2 + 0.0625 - 0.25, 3 - 0.125])


def test_lambda_one_is_the_discounted_return_less_the_value():
    rewards, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.25, 0.125])
    _, returns = advantages(rewards, values, [0, 3], gamma=0.5, lam=1.0)
    assert returns.tolist() == pytest.approx([1 + 0.5 * 2 + 0.25 * 3, 2 + 0.5 * 3, 3])
    _, returns = advantages(rewards, values, [0, 3], gamma=1.0, lam=1.0)
    assert returns.tolist() == pytest.approx([6, 5, 3])


def test_gamma_zero_sees_the_tokens_own_reward_alone():
    rewards, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.25, 0.125])
    for lam in (0.0, 0.95, 1.0):
        found, returns = advantages(rewards, values, [0, 1, 3], gamma=0.0, lam=lam)
        assert found.tolist() == pytest.approx([0.5, 1.75, 2.875])
        assert returns.tolist() == pytest.approx([1, 2, 3])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.99), (0.97, 0.9), (1.0, 1.0)])
def test_ragged_answers_are_as_if_alone(gamma, lam):
    torch.manual_seed(0)
    borders = ragged(answers=23, longest=40)
    rewards, values = torch.randn(borders[-1]), torch.randn(borders[-1])
    found, returns = advantages(rewards, values, borders, gamma, lam)
    expected = torch.tensor(one_by_one(rewards.tolist(), values.tolist(), borders, gamma, lam))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, expected + values, rtol=1e-5, atol=1e-5)
    for start, end in itertools.pairwise(borders):
        alone = advantages(rewards[start:end], values[start:end], [0, end - start], gamma, lam)
        assert torch.equal(alone[0], found[start:end])


def test_an_answers_numbers_change_with_nothing_outside_it():
    torch.manual_seed(0)
    rewards, values, borders = torch.randn(9), torch.randn(9), [0, 4, 4, 6, 9]
    found, _ = advantages(rewards, values, borders, 1.0, 0.95)
    rewards[[0, 8]], values[[3, 6]] = 100.0, -100.0
    other, _ = advantages(rewards, values, borders, 1.0, 0.95)
    assert torch.equal(found[4:6], other[4:6])
    assert not torch.equal(found[:4], other[:4])


@pytest.mark.parametrize("borders", [[0], [0, 0], [0, 0, 0]])
def test_answers_without_any_tokens_do_no_harm(borders):
    nothing, scores = torch.zeros(0), torch.ones(len(borders) - 1)
    assert token_rewards(scores, nothing, borders, 0.1).shape == (0,)
    assert [part.shape for part in advantages(nothing, nothing, borders, 1.0, 0.95)] == [(0,), (0,)]
    sums = policy_loss(nothing, nothing, nothing, 0.2)
    assert [sums.loss.item(), sums.ratio.item(), sums.clipped.item(), sums.kl.item()] == [0, 0, 0, 0]
    assert value_loss(nothing, nothing, nothing, 0.2).item() == 0
    assert whitened(nothing, MomentSums.of(nothing)).shape == (0,)
    assert explained_variance(MomentSums.of(nothing), MomentSums.of(nothing)) is None


def test_borders_that_are_not_of_these_tokens_are_refused():
    for borders in ([], [0, 2], [1, 3], [0, 4]):
        with pytest.raises(ValueError, match="run from 0 to their 3 tokens"):
            advantages(torch.zeros(3), torch.zeros(3), borders, 1.0, 1.0)
        with pytest.raises(ValueError, match="run from 0 to their 3 tokens"):
            token_rewards(torch.zeros(1), torch.zeros(3), borders, 0.1)


def test_a_whole_step_of_advantages_is_quick():
    borders = ragged(answers=512, longest=1024)
    rewards, values = torch.randn(borders[-1]), torch.randn(borders[-1])
    advantages(rewards, values, borders, 1.0, 0.99)
    started = time.process_time()
    advantages(rewards, values, borders, 1.0, 0.99)
    # 0.005 CPU seconds, with 200 times as much allowed; a loop over its 220,000 tokens takes seconds anywhere
    assert time.process_time() - started < 1.0


def test_advantages_are_not_learned_through():
    values = torch.ones(3, requires_grad=True)
    found, returns = advantages(torch.ones(3), values, [0, 3], 1.0, 1.0)
    assert not found.requires_grad
    assert not returns.requires_grad


def test_whitening_by_hand():
    """1, 2, 3, 6: mean 3, population variance (4 + 1 + 0 + 9) / 4 = 3.5."""
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    moments = MomentSums.of(values)
    assert (moments.count, moments.mean, moments.variance) == (4, 3, 3.5)
    spread = math.sqrt(3.5)
    assert whitened(values, moments).tolist() == pytest.approx([-2 / spread, -1 / spread, 0, 3 / spread])


def test_whitening_counts_every_token_once_and_zeros_too():
    values = torch.tensor([0.0, 0.0, 0.0, 4.0])
    assert MomentSums.of(values) == MomentSums(count=4, total=4, squares=16)
    found = whitened(values, MomentSums.of(values))
    assert found.mean().item() == pytest.approx(0, abs=1e-7)
    assert found.square().mean().item() == pytest.approx(1, rel=1e-6)


def test_moments_of_ranks_add_up_to_those_of_all():
    torch.manual_seed(0)
    values = torch.randn(100) * 3 + 5
    ranks = [values[:1], values[1:1], values[1:90], values[90:]]
    summed = sum(map(MomentSums.of, ranks), MomentSums(0, 0, 0))
    whole = MomentSums.of(values)
    assert summed.count == whole.count
    assert (summed.mean, summed.variance) == pytest.approx((whole.mean, whole.variance), rel=1e-12)
    parts = torch.cat([whitened(part, summed) for part in ranks])
    torch.testing.assert_close(parts, whitened(values, whole), rtol=1e-6, atol=1e-6)


def test_moments_far_from_zero_keep_their_digits():
    """Mean 10⁴, deviation 0.1: the squares differ in the tenth digit, where fp32 has seven."""
    torch.manual_seed(0)
    values = 1e4 + 0.1 * torch.randn(10_000)
    moments = MomentSums.of(values)
    assert moments.std == pytest.approx(values.double().std(correction=0).item(), rel=1e-5)
    assert whitened(values, moments).square().mean().item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 0.7, -1234.567])
def test_numbers_that_do_not_vary_become_zero(value):
    """Not the rounding of their sums over the 10⁻⁸."""
    for count in (1, 3, 7, 1000, 1001, 12345):
        values = torch.full((count,), value)
        assert MomentSums.of(values).variance == 0
        assert whitened(values, MomentSums.of(values)).abs().max().item() < 1e-4


def test_a_number_that_is_none_is_not_hidden():
    assert math.isnan(MomentSums.of(torch.tensor([1.0, math.nan])).std)


RATIOS = torch.tensor([1.0, 1.1, 1.5, 0.5, 1.5, 0.5, 1.2])
ADVANTAGES = torch.tensor([2.0, 1.0, 1.0, 1.0, -1.0, -1.0, 0.0])
"""Inside twice; then too high and too low with a good answer, and with a bad one; then nothing to gain."""


def test_the_policy_loss_by_hand():
    """With clip 0.2, −min(ratio · A, clipped · A):

    1 · 2 = 2; 1.1; min(1.5, 1.2) = 1.2, clipped; min(0.5, 0.8) = 0.5; min(−1.5, −1.2) = −1.5;
    min(−0.5, −0.8) = −0.8, clipped; 0. Sum 2 + 1.1 + 1.2 + 0.5 − 1.5 − 0.8 + 0 = 2.5.
    """
    old = torch.linspace(-3, -1, 7)
    logprobs = (old + RATIOS.log()).requires_grad_()
    sums = policy_loss(logprobs, old, ADVANTAGES, clip=0.2)
    assert sums.loss.item() == pytest.approx(-2.5, rel=1e-5)
    assert sums.ratio.item() == pytest.approx(1 + 1.1 + 1.5 + 0.5 + 1.5 + 0.5 + 1.2, rel=1e-5)
    assert sums.clipped.item() == 2
    # ratio − 1 − ln ratio of each
    by_hand = sum(ratio - 1 - math.log(ratio) for ratio in (1.1, 1.5, 0.5, 1.5, 0.5, 1.2))
    assert sums.kl.item() == pytest.approx(by_hand, rel=1e-5)
    assert [part.requires_grad for part in (sums.ratio, sums.clipped, sums.kl)] == [False] * 3
    sums.loss.backward()
    # −ratio · A, and nothing where the clip bites
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-2, -1.1, 0, -0.5, 1.5, 0, 0], abs=1e-5)


def test_an_asymmetric_clip_by_hand():
    """Down to 0.8 and up to 1.4: only the third token of the above changes, min(1.5, 1.4) = 1.4."""
    old = torch.linspace(-3, -1, 7)
    logprobs = (old + RATIOS.log()).requires_grad_()
    sums = policy_loss(logprobs, old, ADVANTAGES, clip=0.2, clip_high=0.4)
    assert sums.loss.item() == pytest.approx(-2.7, rel=1e-5)
    assert sums.clipped.item() == 2
    sums.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-2, -1.1, 0, -0.5, 1.5, 0, 0], abs=1e-5)
    wider = policy_loss(logprobs, old, ADVANTAGES, clip=0.2, clip_high=0.6)
    assert (wider.loss.item(), wider.clipped.item()) == (pytest.approx(-2.8, rel=1e-5), 1)
    same = [policy_loss(logprobs, old, ADVANTAGES, 0.2, high).loss for high in (None, 0.2)]
    assert torch.equal(*same)


def test_weights_are_of_the_loss_and_not_of_the_measures():
    """Terms 2, 1.1, 1.2, 0.5, −1.5, −0.8, 0 in answers of two and five tokens: 3.1 / 2 − 0.6 / 5."""
    old = torch.linspace(-3, -1, 7)
    logprobs = (old + RATIOS.log()).requires_grad_()
    weights = torch.tensor([1 / 2] * 2 + [1 / 5] * 5)
    weighted = policy_loss(logprobs, old, ADVANTAGES, 0.2, weights_N=weights)
    plain = policy_loss(logprobs, old, ADVANTAGES, 0.2)
    assert weighted.loss.item() == pytest.approx(-(3.1 / 2 - 0.6 / 5), rel=1e-5)
    for name in ("ratio", "clipped", "kl"):
        assert torch.equal(getattr(weighted, name), getattr(plain, name))
    weighted.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-1, -0.55, 0, -0.1, 0.3, 0, 0], abs=1e-5)
    ones = policy_loss(logprobs, old, ADVANTAGES, 0.2, weights_N=torch.ones(7))
    assert torch.equal(ones.loss, plain.loss)


def test_the_loss_of_whole_answers_by_hand():
    """Ratios are products: 1.1 · 1.1 = 1.21, clipped to 1.2; none, 1; 0.5 · 1.5 · 1.2 = 0.9; 0.5, below 0.8 but bad.

    Advantages 2, 3, −1, 1: min(2.42, 2.4) + 3 + min(−0.9, −0.9) + min(0.5, 0.8) = 5.
    """
    old = torch.linspace(-3, -1, 6)
    ratios = torch.tensor([1.1, 1.1, 0.5, 1.5, 1.2, 0.5])
    logprobs = (old + ratios.log()).requires_grad_()
    borders, gains = [0, 2, 2, 5, 6], torch.tensor([2.0, 3.0, -1.0, 1.0])
    sums = answer_policy_loss(logprobs, old, gains, borders, clip=0.2)
    assert sums.loss.item() == pytest.approx(-5, rel=1e-5)
    assert sums.ratio.item() == pytest.approx(1.21 + 1 + 0.9 + 0.5, rel=1e-5)
    assert sums.clipped.item() == 1
    by_hand = sum(ratio - 1 - math.log(ratio) for ratio in (1.21, 0.9, 0.5))
    assert sums.kl.item() == pytest.approx(by_hand, rel=1e-4)
    sums.loss.backward()
    assert logprobs.grad is not None  # each token: −ratio of its answer · advantage, 0 where clipped
    assert logprobs.grad.tolist() == pytest.approx([0, 0, 0.9, 0.9, 0.9, -0.5], abs=1e-5)
    with pytest.raises(ValueError, match="run from 0 to their 6 tokens"):
        answer_policy_loss(logprobs, old, gains, [0, 2], 0.2)


def test_advantages_within_groups_by_hand():
    """Scores 1, 2, 6 and 5, 5, 5: means 3 and 5; sample variance (4 + 1 + 9) / 2 = 7 and 0."""
    scores = np.array([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert group_advantages(scores, 3, scale=False).tolist() == [-2, -1, 3, 0, 0, 0]
    std = math.sqrt(7) + 1e-4
    expected = pytest.approx([-2 / std, -1 / std, 3 / std, 0, 0, 0])
    assert group_advantages(scores, 3, scale=True).tolist() == expected
    assert group_advantages(scores.astype(np.float32), 2, scale=True).dtype == np.float64


def test_leaving_one_out_by_hand():
    """1 − (2 + 6) / 2, 2 − (1 + 6) / 2, 6 − (1 + 2) / 2: the group's advantages times 3 / 2."""
    rewards = np.array([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert leave_one_out(rewards, 3).tolist() == [-3, -1.5, 4.5, 0, 0, 0]
    assert leave_one_out(rewards[:2], 2).tolist() == [-1, 1]


@pytest.mark.parametrize("size", [0, 1, 4])
def test_answers_that_are_not_whole_groups_are_refused(size):
    for function in (leave_one_out, lambda values, size: group_advantages(values, size, scale=True)):
        with pytest.raises(ValueError, match="6 answers are not whole groups"):
            function(np.zeros(6), size)


def test_before_the_first_update_the_gradient_is_the_advantage_whatever_the_clip():
    old = torch.linspace(-3, -1, 4)
    for clip in (0.0, 0.2, 10.0):
        logprobs = old.clone().requires_grad_()
        sums = policy_loss(logprobs, old, torch.tensor([1.0, -2.0, 0.0, 3.0]), clip)
        sums.loss.backward()
        assert logprobs.grad is not None
        assert logprobs.grad.tolist() == pytest.approx([-1, 2, 0, -3])
        assert (sums.ratio.item(), sums.clipped.item(), sums.kl.item()) == (4, 0, 0)


def test_the_value_loss_by_hand():
    """½ · ((1 − 3)² + (2 − 2)² + (−1 − 1)²) = ½ · (4 + 0 + 4)."""
    values = torch.tensor([1.0, 2.0, -1.0], requires_grad=True)
    loss = value_loss(values, torch.tensor([3.0, 2.0, 1.0]), torch.zeros(3))
    assert loss.item() == 4
    loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [-2, 0, -2]


def test_the_clipped_value_loss_by_hand():
    """Old values 0, clip 0.5, returns 2: values 0.25, 1, 3 and −1 count as 0.25, ½, ½ and −½ where that is worse.

    0.25: (1.75)² both ways, learned from. 1: max(1², 1.5²) = 2.25, no gradient. 3: max(1², 1.5²) = 2.25, none.
    −1: max(3², 2.5²) = 9, learned from. Half the sum: (3.0625 + 2.25 + 2.25 + 9) / 2.
    """
    values = torch.tensor([0.25, 1.0, 3.0, -1.0], requires_grad=True)
    loss = value_loss(values, torch.full((4,), 2.0), torch.zeros(4), clip=0.5)
    assert loss.item() == pytest.approx((3.0625 + 2.25 + 2.25 + 9) / 2)
    loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-1.75, 0, 0, -3])


def test_before_the_first_update_the_value_clip_does_nothing():
    values = torch.tensor([0.25, 1.0, 3.0], requires_grad=True)
    for clip in (None, 0.1):
        values.grad = None
        value_loss(values, torch.full((3,), 2.0), values.detach(), clip).backward()
        assert values.grad is not None
        assert values.grad.tolist() == pytest.approx([-1.75, -1, 1])


def test_explained_variance_by_hand():
    """Returns 1, 2, 3, 4 vary by 1.25; residuals 0, 0, 1, 1 by ¼."""
    returns, values = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 2.0, 3.0])
    every = MomentSums.of(returns)
    assert explained_variance(every, MomentSums.of(returns - values)) == pytest.approx(1 - 0.25 / 1.25)
    assert explained_variance(every, MomentSums.of(returns - returns)) == 1
    assert explained_variance(every, MomentSums.of(returns - 7)) == pytest.approx(
        0
    )  # but the mean, all is missing
    assert explained_variance(every, MomentSums.of(returns + returns)) == pytest.approx(-3)
    assert explained_variance(MomentSums.of(torch.full((9,), 0.7)), every) is None


def test_two_ranks_add_up_to_the_whole():
    torch.manual_seed(0)
    borders, cut = [0, 5, 5, 12, 20], 12
    old, scores = -torch.rand(20) * 3, torch.randn(4)
    logprobs, reference, values = old + 0.3 * torch.randn(20), old + torch.randn(20), torch.randn(20)

    def step(tokens: slice, answers: slice, own: list[int]):
        kl = kl_estimate(old[tokens], reference[tokens], "k3")
        rewards = token_rewards(scores[answers], kl, own, 0.1)
        found, returns = advantages(rewards, values[tokens], own, 1.0, 0.95)
        sums = policy_loss(logprobs[tokens], old[tokens], found, 0.2)
        residuals = MomentSums.of(returns - values[tokens])
        critic = value_loss(values[tokens] + 1, returns, values[tokens], 0.3)
        measures = torch.stack([sums.loss, sums.ratio, sums.clipped, sums.kl, critic])
        return measures, found, MomentSums.of(returns), residuals

    whole = step(slice(None), slice(None), borders)
    ranks = [step(slice(cut), slice(3), [0, 5, 5, 12]), step(slice(cut, None), slice(3, None), [0, 8])]
    torch.testing.assert_close(ranks[0][0] + ranks[1][0], whole[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([ranks[0][1], ranks[1][1]]), whole[1])
    of_ranks = explained_variance(ranks[0][2] + ranks[1][2], ranks[0][3] + ranks[1][3])
    assert of_ranks == pytest.approx(explained_variance(whole[2], whole[3]), rel=1e-9)


def test_bf16_numbers_are_summed_in_fp32():
    logprobs, old = torch.full((1001,), -0.5).bfloat16(), torch.full((1001,), -1.0).bfloat16()
    ones = torch.ones(1001).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        sums = policy_loss(logprobs, old, ones, 10.0)
        critic = value_loss(3 * ones, ones, ones)
    assert sums.loss.dtype == critic.dtype == torch.float32
    assert sums.loss.item() == pytest.approx(-1001 * math.exp(0.5), rel=1e-5)
    assert critic.item() == 1001 * 2


def test_a_tokens_importance_is_truncated():
    """Yao et al.: min(π_old / π_sampled, 2): for the sampler half as likely, a fifth, twice as likely, alike."""
    old = torch.tensor([0.4, 0.5, 0.2, 0.3]).log().requires_grad_()
    weights = truncated_weights(old, torch.tensor([0.2, 0.1, 0.4, 0.3]).log(), largest=2.0)
    assert weights.tolist() == pytest.approx([2.0, 2.0, 0.5, 1.0])
    assert not weights.requires_grad


def test_an_answers_importance_is_that_of_all_its_tokens():
    """2 · ¾ and an empty answer and 3 · 2, truncated at 4."""
    old, sampled = torch.tensor([0.4, 0.3, 0.3, 0.4]).log(), torch.tensor([0.2, 0.4, 0.1, 0.2]).log()
    assert truncated_answer_weights(old, sampled, [0, 2, 2, 4], 4.0).tolist() == pytest.approx(
        [1.5, 1.0, 4.0]
    )


def test_importance_weights_multiply_the_surrogate_and_its_gradient_and_no_measure():
    old, advantages_N = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([1.0, -1.0, 2.0])
    weights = torch.tensor([0.5, 2.0, 1.0])
    logprobs = torch.tensor([-0.9, -2.2, -0.1], requires_grad=True)
    plain = [policy_loss(logprobs[t : t + 1], old[t : t + 1], advantages_N[t : t + 1], 0.2) for t in range(3)]
    (expected,) = torch.autograd.grad(
        sum(w * sums.loss for w, sums in zip(weights, plain, strict=True)), logprobs
    )
    weighted = policy_loss(logprobs, old, advantages_N, 0.2, weights_N=weights)
    (found,) = torch.autograd.grad(weighted.loss, logprobs)
    torch.testing.assert_close(found, expected)
    assert weighted.ratio.item() == pytest.approx(sum(sums.ratio.item() for sums in plain))
    answers = answer_policy_loss(logprobs, old, advantages_N, [0, 1, 2, 3], 0.2, weights_A=weights)
    assert answers.loss.item() == pytest.approx(weighted.loss.item())
