"""Rewards, advantages and updates of hand-made answers, by loops of their own."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.data.test_replay import stream
from tests.unit.rollout.test_rollout import Alone, rollout
from tests.unit.rollout.test_shaping import CONFIG
from tuner.algorithms.ppo import PPO, Valued
from tuner.config import override
from tuner.rollout import updates as module
from tuner.rollout.correlation import pearson, spearman
from tuner.rollout.experience import answer_rewards
from tuner.rollout.rollout_figures import (
    gold_auc,
    gold_of_best,
    rollout_figures,
    split_best,
    token_means,
)


def with_rewards(observed, scores_A, config):
    return PPO(config).reward(observed, scores_A)


def with_advantages(rewarded, config, devices):
    return PPO(config).estimate(rewarded, np.zeros(0), devices)


def updates(rollout, experiences, replay, replayed, config, devices):
    epochs, mini_batches = config.update_epochs, config.mini_batches
    return module.updates(
        rollout, experiences, replay, replayed, epochs=epochs, mini_batches=mini_batches, devices=devices
    )


def health(rollout, scores_A, experiences, devices):
    """All that a step's record says of a rollout."""
    algorithm = PPO(CONFIG)
    rewards_A = answer_rewards(experiences, len(rollout), devices)
    figures = rollout_figures(rollout, scores_A, rewards_A, GOLDS)
    means = token_means(rollout, experiences, algorithm.token_figures, devices)
    return figures | algorithm.derived_figures(means)


class One(Alone):
    """One process that adds up what it has."""

    def sum(self, values):
        return values

    def gather(self, items):
        return items


def observed(made, mini_batches=1, tokens_per_pass=48) -> list[Valued]:
    """With log-probabilities and values drawn by the token, so that a row's order does not matter."""
    found = []
    for row in made.rows(mini_batches, tokens_per_pass, One()):
        tokens = row.batch.tokens_T[row.batch.learned_N].tolist()
        drawn = np.stack([np.random.default_rng(token).normal(size=4) for token in tokens])
        old_N, reference_N, values_N, entropies_N = torch.from_numpy(drawn).float().unbind(1)
        found.append(Valued(row, old_N, reference_N, entropies_N, values_N))
    return found


def of_answers(name: str, found: list[Any]) -> dict[int, np.ndarray]:
    """A value of every token, by answer."""
    result = {}
    for one in found:
        for place, index in enumerate(one.row.answers.tolist()):
            part = getattr(one, name)[one.row.borders[place] : one.row.borders[place + 1]]
            result[index] = part.double().numpy()
    return result


SCORES = np.array([0.5, -2.0, 0.0, 1.0, 3.0, -1.0, 0.25, -0.75])
GOLDS = np.array([1.0, 0.0, 0.5, 0.25, 0.75, 1.0, 0.0, 1.0])
FIELDS = ("prompts", "tokens", "answers", "texts")
ESTIMATES = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) - 1 + d}


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_rewards(kind, kl):
    """Every token pays for its divergence; the score comes with the last, ended or cut off, of one token or many."""
    found = with_rewards(observed(rollout()), SCORES, override(CONFIG, {"kl": kl, "kl_estimator": kind}))
    old, reference, rewards = (of_answers(name, found) for name in ("old_N", "reference_N", "rewards_N"))
    for index, score in enumerate(SCORES):
        expected = -kl * ESTIMATES[kind](old[index] - reference[index])
        expected[-1] += score
        assert rewards[index] == pytest.approx(expected, abs=1e-5)


def test_a_score_that_is_not_finite_leaves_the_other_answers_alone():
    """Groups of other prompts share its packed row, and their advantages are of these sums."""
    packed = observed(rollout(), tokens_per_pass=1000)
    expected, spoiled = SCORES.copy(), SCORES.copy()
    expected[2] = spoiled[2] = np.nan
    sums = answer_rewards(with_rewards(packed, spoiled, override(CONFIG, {"kl": 0.0})), len(SCORES), One())
    assert sums == pytest.approx(expected, nan_ok=True)


def test_without_a_penalty_an_estimate_that_overflows_costs_nothing():
    """exp(1000) is infinite, and 0 times that is not a number."""
    config = override(CONFIG, {"kl": 0.0, "kl_estimator": "k3"})
    far = [replace(row, reference_N=row.old_N + 1000) for row in observed(rollout())]
    assert answer_rewards(with_rewards(far, SCORES, config), len(SCORES), One()) == pytest.approx(SCORES)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.99), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("tokens_per_pass", [48, 1000])
def test_advantages(gamma, lam, tokens_per_pass):
    config = override(CONFIG, {"gamma": gamma, "gae_lambda": lam, "kl": 0.3})
    found = with_rewards(observed(rollout(), tokens_per_pass=tokens_per_pass), SCORES, config)
    found = with_advantages(found, config, One())
    values, rewards = (of_answers(name, found) for name in ("values_N", "rewards_N"))
    advantages, returns = (of_answers(name, found) for name in ("advantages_N", "returns_N"))
    for index in range(len(SCORES)):
        expected = gae(rewards[index], values[index], gamma, lam)
        assert advantages[index] == pytest.approx(expected, abs=1e-4)
        assert returns[index] == pytest.approx(expected + values[index], abs=1e-4)


def gae(rewards, values, gamma, lam):
    """As a sum over all later errors: no recursion."""
    later = np.append(values[1:], 0.0)
    errors = rewards + gamma * later - values
    count = len(errors)
    return np.array(
        [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, count)) for t in range(count)]
    )


def test_whitening_is_over_all_tokens_of_the_step_and_leaves_the_returns():
    plain = with_advantages(with_rewards(observed(rollout()), SCORES, CONFIG), CONFIG, One())
    config = override(CONFIG, {"whiten_advantages": True})
    white = with_advantages(with_rewards(observed(rollout()), SCORES, config), config, One())
    tokens = np.concatenate(list(of_answers("advantages_N", plain).values()))
    for index, advantages in of_answers("advantages_N", plain).items():
        expected = (advantages - tokens.mean()) / (tokens.std() + 1e-8)
        assert of_answers("advantages_N", white)[index] == pytest.approx(expected, abs=1e-5)
        assert np.array_equal(of_answers("returns_N", plain)[index], of_answers("returns_N", white)[index])
    assert len(plain) > 1  # rows that are not whitened each by itself


def test_updates_go_through_the_mini_batches_in_order_and_split_the_replay():
    made, replay = rollout(), stream()
    config = override(CONFIG, {"mini_batches": 3, "update_epochs": 2})
    rows = [3, 0, 7, 9, 1, 4, 2]
    found = list(updates(made, observed(made, 3), replay, rows, config, One()))
    parts = [part.tolist() for part in np.array_split(np.arange(8), 3)]
    learned = [sorted(i for one in update.experiences for i in one.row.answers.tolist()) for update in found]
    assert learned == parts * 2
    shares = [share.tolist() for share in np.array_split(rows, 6)]
    for update, share, part in zip(found, shares, parts * 2, strict=True):
        assert update.totals["answer_tokens"] == made.answer_lengths[part].sum()
        assert update.totals["replay_tokens"] == replay.target_weight(share)
        tokens = sorted(token for batch in update.replayed for token in batch.tokens_T.tolist())
        assert tokens == sorted(t for row in share for t in replay.examples.example(row)[0].tolist())


def test_fewer_replayed_rows_than_updates_leave_some_without():
    made = rollout()
    config = override(CONFIG, {"mini_batches": 3})
    found = list(updates(made, observed(made, 3), stream(), [5], config, One()))
    assert [len(update.replayed) for update in found] == [1, 0, 0]
    assert ["replay_tokens" in update.totals for update in found] == [True, False, False]
    assert all(not one.replayed for one in updates(made, observed(made), None, [], CONFIG, One()))


@pytest.mark.parametrize("tokens_per_pass", [48, 1000])
def test_losses_on_masked_answers_are_those_of_a_rollout_without_them(tokens_per_pass):
    """Truncated ones are answers 2 and 5; values are drawn by the token, so that rows may be packed otherwise."""
    made = rollout()
    kept = made.ended.nonzero()[0]
    assert 0 < len(kept) < len(made)
    masked = replace(made, masks_truncated=True)
    parts = [
        [values[index] for index in kept] for values in (made.prompts, made.tokens, made.answers, made.texts)
    ]
    config = override(CONFIG, {"kl": 0.3, "whiten_advantages": True})
    found = []
    for one, scores in (
        (masked, SCORES),
        (replace(made, **dict(zip(FIELDS, parts, strict=True))), SCORES[kept]),
    ):
        rewarded = with_rewards(observed(one, tokens_per_pass=tokens_per_pass), scores, config)
        experiences = with_advantages(rewarded, config, One())
        found += updates(one, experiences, None, [], config, One())
    own, other = found
    assert own.totals == other.totals
    names = ("old_N", "reference_N", "values_N", "advantages_N", "returns_N", "rewards_N", "entropies_N")
    for name in names:
        ours, theirs = of_answers(name, own.experiences), of_answers(name, other.experiences)
        assert ours.keys() == set(kept.tolist())
        for place, index in enumerate(kept.tolist()):
            assert ours[index] == pytest.approx(theirs[place], abs=1e-6), name
    for one in own.experiences:
        tokens = one.row.batch.tokens_T[one.row.batch.learned_N].tolist()
        answers = np.concatenate([made.answers[index].tokens for index in one.row.answers])
        assert tokens == answers.tolist()
    figures = rollout_figures(masked, SCORES, SCORES, None)
    assert (figures["masked"], figures["score"]) == (2 / 8, SCORES.mean())


def test_a_rollout_of_truncated_answers_alone_has_updates_of_nothing():
    made = rollout()
    cut = [replace(answer, ended=False) for answer in made.answers]
    made = replace(made, answers=cut, masks_truncated=True)
    (update,) = updates(made, observed(made), None, [], CONFIG, One())
    assert (list(update.experiences), update.totals) == ([], {"answer_tokens": 0.0, "answers": 0.0})


def test_a_ranks_updates_know_the_totals_of_all():
    made = rollout()
    config = override(CONFIG, {"mini_batches": 2})
    ranks = [list(updates(made, [], stream(), [1, 2, 3], config, Alone(rank, 5))) for rank in range(5)]
    assert all([update.totals for update in rank] == [update.totals for update in ranks[0]] for rank in ranks)


def correlated(ones: np.ndarray, others: np.ndarray) -> float:
    """Pearson's coefficient by its definition."""
    one, other = ones - ones.mean(), others - others.mean()
    return (one * other).sum() / math.sqrt((one**2).sum() * (other**2).sum())


def test_scores_that_do_not_vary_correlate_with_nothing():
    lengths = np.array([3, 1, 2])
    assert pearson(np.array([0.1, 0.1, 0.1]), lengths) is None
    assert pearson(np.array([0.1, 0.2, 0.3]), np.array([4, 4, 4])) is None
    assert pearson(np.array([0.3, 0.1, 0.2]), lengths) == pytest.approx(1)
    assert math.isnan(pearson(np.array([0.3, math.nan, 0.2]), lengths))


def ranks(values: np.ndarray) -> np.ndarray:
    """Places in order, of which equal values share the mean."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def test_rank_correlation_is_that_of_mean_ranks():
    draw = np.random.default_rng(0)
    for _ in range(20):
        scores, lengths = draw.normal(size=30).round(1), draw.integers(1, 9, 30)
        expected = correlated(ranks(scores), ranks(lengths))
        assert spearman(scores, lengths) == pytest.approx(expected, abs=1e-12)
    assert spearman(np.exp(lengths), lengths) == pytest.approx(1)
    assert spearman(np.ones(30), lengths) is None
    assert math.isnan(spearman(np.array([0.3, math.nan]), np.array([1, 2])))


def test_the_best_scored_tenth():
    """A tenth rounded down and at least one answer; ties at its border share the places, whatever their order."""
    golds = np.array([1.0, 0.0, 0.0, 1.0] + [0.0] * 25)
    falling = np.arange(29.0)[::-1]
    assert gold_of_best(falling, golds) == 0.5  # of two
    assert gold_of_best(np.append(falling, -1.0), np.append(golds, 1.0)) == pytest.approx(1 / 3)  # of three
    assert gold_of_best(falling[:4], golds[:4]) == 1.0  # of one
    tied = np.array([9.0, 5.0, 5.0, 5.0] + [0.0] * 26)
    expected = (1.0 + 2 * (0 + 0 + 1) / 3) / 3
    for order in (slice(None), slice(None, None, -1)):
        assert gold_of_best(tied[order], np.append(golds, 0.0)[order]) == pytest.approx(expected)
    assert gold_of_best(np.zeros(29), golds) == pytest.approx(golds.mean())
    unscored = np.array([math.nan, 2.0, 1.0])
    assert gold_of_best(unscored, np.array([1.0, 0.0, 1.0])) == 0.0
    assert gold_of_best(np.full(3, math.nan), np.ones(3)) is None


def test_right_answers_score_above_wrong_ones():
    golds = np.array([1.0, 1.0, 0.0, 0.0])
    assert gold_auc(np.array([3.0, 2.0, 1.0, 0.0]), golds) == 1.0
    assert gold_auc(np.array([0.0, 1.0, 2.0, 3.0]), golds) == 0.0
    assert gold_auc(np.array([2.0, 1.0, 1.0, 0.0]), golds) == 3.5 / 4, "a tie is half"
    assert gold_auc(np.zeros(4), golds) == 0.5
    assert gold_auc(np.array([3.0, math.nan, 1.0, 9.0]), golds) == 0.5, "without the answer that has no score"
    assert gold_auc(np.arange(4.0), np.ones(4)) is gold_auc(np.arange(4.0), np.zeros(4)) is None


def test_the_best_scored_answers_are_told_from_the_others():
    texts = [str(index) for index in range(8)]
    scores = np.array([0.0, math.nan, 2.0, 1.0, 2.0, -1.0, 0.5, 0.0])
    best, others = split_best(replace(rollout(), texts=texts), scores)
    assert (best, others) == (["2"], ["4", "3", "6", "0", "7", "5", "1"])


def test_the_record_by_loops():
    """Means over tokens of all rows, and over answers; conditions apart."""
    made = rollout()
    config = override(CONFIG, {"kl": 0.3})
    conditions = ["a", "b", None, "a", "a", "b", None, "a"]
    prompts = [replace(prompt, condition=name) for prompt, name in zip(made.prompts, conditions, strict=True)]
    made = replace(made, prompts=prompts)
    found = with_advantages(with_rewards(observed(made), SCORES, config), config, One())
    facts = health(made, SCORES, found, One())
    names = ("old_N", "reference_N", "values_N", "entropies_N", "rewards_N", "returns_N")
    old, reference, values, entropies, rewards, returns = (of_answers(name, found) for name in names)

    def over_tokens(by_answer):
        return np.concatenate([by_answer[index] for index in range(8)])

    lead = over_tokens(old) - over_tokens(reference)
    summed = np.array([rewards[index].sum() for index in range(8)])
    expected = {
        "score": SCORES.mean(),
        "score_std": math.sqrt(((SCORES - SCORES.mean()) ** 2).mean()),
        "score_min": min(SCORES),
        "score_max": max(SCORES),
        "score_length_correlation": correlated(SCORES, np.array([1, 5, 8, 2, 1, 8, 3, 4])),
        "score_length_rank_correlation": correlated(
            np.array([5, 0, 3, 6, 7, 1, 4, 2]), np.array([0.5, 5, 6.5, 2, 0.5, 6.5, 3, 4])
        ),
        # of scores 0.5, 1, 3, -0.75 the ranks; of lengths 1, 2, 1, 4
        "score_length_rank_correlation/a": correlated(np.array([1, 2, 3, 0]), np.array([0.5, 2, 0.5, 3])),
        "score_length_rank_correlation/b": 1.0,  # -2 of 5 tokens, -1 of 8
        "score/a": SCORES[[0, 3, 4, 7]].mean(),
        "score/b": SCORES[[1, 5]].mean(),
        "gold": 4.5 / 8,
        "gold/a": (1.0 + 0.25 + 0.75 + 1.0) / 4,
        "gold/b": 0.5,
        "gold_top_tenth": 0.75,
        # right: 0.5, 0, 3, -1, -0.75; wrong: -2, 1, 0.25
        "gold_auc": (2 + 1 + 3 + 1 + 1) / 15,
        "reward": summed.mean(),
        "reward/a": summed[[0, 3, 4, 7]].mean(),
        "reward/b": summed[[1, 5]].mean(),
        "kl": lead.mean(),
        "kl_per_answer": np.mean([(old[index] - reference[index]).sum() for index in range(8)]),
        "kl_k3": (np.exp(-lead) - 1 + lead).mean(),
        "entropy": over_tokens(entropies).mean(),
        "value": over_tokens(values).mean(),
        "generator_gap": np.abs(over_tokens(old)).mean(),  # the generator said 0 everywhere
        "explained_variance": 1
        - (over_tokens(returns) - over_tokens(values)).var() / over_tokens(returns).var(),
        "length": np.mean([1, 5, 8, 2, 1, 8, 3, 4]),
        "ended": 6 / 8,
        "repetition": 0.0,
        "prompts": 8,
    }
    assert facts.keys() == expected.keys()
    for name, value in expected.items():
        assert facts[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
