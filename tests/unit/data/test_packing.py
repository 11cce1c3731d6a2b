"""Planning: nothing lost, nothing cut, steps and passes full, and a step depends on nothing but its data."""

import time
from bisect import bisect_left

import numpy as np
import pytest

from tuner.data.packing import Share, exhausted, mixed, pack, plan_steps, shuffled, strata


def long_tailed(count: int, seed: int = 0) -> np.ndarray:
    """Lengths as chat data have them: a median of 200 tokens, a tail to 2048."""
    drawn = np.random.default_rng(seed).lognormal(5.3, 0.9, count)
    return np.clip(drawn, 8, 2048).astype(np.int64)


def test_samples_in_are_samples_out():
    lengths = long_tailed(20_000)
    steps = plan_steps(lengths, 32_768, shuffled(len(lengths), seed=1), epochs=2.0)
    drawn = np.concatenate([step.samples for step in steps])
    assert np.array_equal(np.bincount(drawn), np.full(len(lengths), 2))


def test_half_an_epoch_is_half_the_samples():
    lengths = long_tailed(1000)
    steps = plan_steps(lengths, 32_768, shuffled(len(lengths), seed=1), epochs=1.5)
    counts = np.bincount(np.concatenate([step.samples for step in steps]), minlength=1000)
    assert sorted(set(counts)) == [1, 2]
    assert counts.sum() == 1500


def test_steps_are_full_and_passes_few():
    lengths = long_tailed(50_000)
    budget, capacity = 32_768, 2_048
    steps = plan_steps(lengths, budget, shuffled(len(lengths), seed=0), epochs=1.0)
    sizes = [int(lengths[step.samples].sum()) for step in steps]
    assert max(sizes) <= budget
    assert np.mean(sizes[:-1]) / budget >= 0.99
    passes = [pack(lengths[step.samples].tolist(), capacity) for step in steps]
    assert sum(map(len, passes)) <= 1.05 * sum(-(-size // capacity) for size in sizes)


def seconds_of_lookups(lengths: np.ndarray) -> float:
    """CPU seconds of one binary search per length: the least work a planner in Python can do on it."""
    start = time.process_time()
    rooms = list(range(0, 2048, 64))
    for length in lengths.tolist():
        bisect_left(rooms, length)
    return time.process_time() - start


def test_a_million_lengths_are_planned_at_the_cost_of_fifty_lookups_each():
    """24 to 29 were measured; a plan that is worse than n log n costs hundreds."""
    lengths = long_tailed(1_000_000)
    before = seconds_of_lookups(lengths)
    start = time.process_time()
    steps = plan_steps(lengths, 32_768, shuffled(len(lengths), seed=0), epochs=1.0)
    for step in steps:
        pack(lengths[step.samples].tolist(), 2_048)
    planning = time.process_time() - start
    assert planning < 50 * (before + seconds_of_lookups(lengths)) / 2


@pytest.mark.parametrize("capacity", [16, 33, 100])
def test_pack_is_a_partition_within_capacity(capacity: int):
    generator = np.random.default_rng(capacity)
    for _ in range(200):
        lengths = generator.integers(1, 17, generator.integers(1, 40)).tolist()
        groups = pack(lengths, capacity)
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        assert all(sum(lengths[index] for index in group) <= capacity for group in groups)


def test_pack_completes_groups_where_best_fit_wastes_one():
    # best-fit decreasing makes 6+4, 5+3+2: two groups are enough for 20 tokens
    assert len(pack([6, 5, 4, 3, 2], 10)) == 2


def test_pack_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="11 tokens is longer than a pass of 10"):
        pack([3, 11], 10)


def test_plan_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="longer than a step"):
        plan_steps(np.asarray([11]), 10, shuffled(1, seed=0), epochs=1.0)


def test_a_step_does_not_depend_on_the_steps_of_other_runs():
    lengths = long_tailed(5_000)
    one, two = (plan_steps(lengths, 8_192, shuffled(len(lengths), seed=3), epochs) for epochs in (1.0, 2.0))
    whole = len(one) // 2  # towards its end the shorter run has no next epoch to fill its steps from
    assert all(np.array_equal(one[index].samples, two[index].samples) for index in range(whole))


def test_seeds_and_epochs_change_the_order():
    order = shuffled(1000, seed=0)
    assert not np.array_equal(order(0), order(1))
    assert not np.array_equal(order(0), shuffled(1000, seed=1)(0))
    assert np.array_equal(order(0), shuffled(1000, seed=0)(0))


def test_ranks_share_passes_and_may_get_none():
    passes = [[0], [1], [2]]
    assert [Share(rank, 2).of(passes) for rank in range(2)] == [[[0], [2]], [[1]]]
    assert Share(1, 2).of(passes[:1]) == []


def test_ranks_that_hold_a_model_together_get_as_many_passes():
    passes = [[0], [1], [2], [3]]
    assert [Share(rank, 3, equal=True).of(passes) for rank in range(3)] == [[[0], [3]], [[1], ()], [[2], ()]]
    assert [Share(rank, 2, equal=True).of(passes) for rank in range(2)] == [[[0], [2]], [[1], [3]]]
    assert [Share(rank, 2, equal=True).of([]) for rank in range(2)] == [[], []]


def test_sources_keep_their_shares_while_they_last():
    generator = np.random.default_rng(0)
    lengths = generator.integers(10, 200, 4000)
    sources = np.repeat([0, 1], [1000, 3000])
    order = mixed(lengths, sources, shares=[3.0, 1.0], seed=0)(0)
    assert sorted(order) == list(range(4000))
    head = order[:800]
    tokens = np.bincount(sources[head], weights=lengths[head])
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.03)


def test_short_rows_keep_their_share_of_the_tokens_and_sources_theirs_in_them():
    """Sources 0 and 1 have rows of both kinds, 2 has short ones only: half of the tokens is short all the same."""
    generator = np.random.default_rng(0)
    lengths = np.concatenate([generator.integers(10, 200, 6000), generator.integers(10, 50, 3000)])
    sources = np.repeat([0, 1, 2], [3000, 3000, 3000])
    parts, shares = strata(lengths, sources, [3.0, 1.0, 4.0], below=50, short=0.5)
    head = mixed(lengths, parts, shares, seed=0)(0)[:1500]
    tokens = np.bincount(parts[head], weights=lengths[head], minlength=6).reshape(3, 2)
    tokens /= tokens.sum()
    assert tokens.sum(axis=0) == pytest.approx([0.5, 0.5], abs=0.02)
    assert tokens[:, 0] == pytest.approx([3 / 16, 1 / 16, 4 / 16], abs=0.02)
    assert tokens[:, 1] == pytest.approx([3 / 8, 1 / 8, 0], abs=0.02)
    assert set(parts[lengths < 50]) == {0, 2, 4}


def test_the_end_of_a_source_is_known():
    lengths = np.full(100, 10)
    sources = np.repeat([0, 1], [20, 80])
    order = mixed(lengths, sources, shares=[1.0, 1.0], seed=0)
    steps = plan_steps(lengths, 100, order, epochs=1.0)
    assert list(exhausted(steps, sources, 2)) == [(0, 3)]  # 20 of the first 40 samples, 10 a step
