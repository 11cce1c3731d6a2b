"""Rows of answers: their pairs, and that taking, gathering and packing lose and mix up nothing."""

import itertools
from collections import Counter

import numpy as np
import pytest

from tuner.data.batch import gather, pack_all
from tuner.data.comparisons import ComparisonCollector, Comparisons, TokenizedComparison, pairs_of
from tuner.data.packing import Share
from tuner.data.stream import make_stream

NAMES = ("brief", "long")


def comparisons(ranks, weights=None, margins=None, ties=False, seed=0) -> Comparisons:
    """Rows of random answers of 2 to 5 tokens, all different, of these ranks each."""
    generator = np.random.default_rng(seed)
    collector, tokens = ComparisonCollector(NAMES, ties), itertools.count(1)
    for place, one in enumerate(ranks):
        weight = 1.0 if weights is None else float(weights[place])
        samples = []
        for _ in one:
            length = int(generator.integers(2, 6))
            loss_weights = np.zeros(length, dtype=np.float32)
            loss_weights[-1] = weight
            sequence = np.array([next(tokens) for _ in range(length)], dtype=np.int32)
            samples.append((sequence, loss_weights))
        margin = 0.0 if margins is None else float(margins[place])
        condition = (*NAMES, None)[place % 3]
        starts = [int(generator.integers(1, len(sequence))) for sequence, _ in samples]
        row = TokenizedComparison(
            samples, starts, tuple(one), margin, weight, condition, twin=place // 2, cut=place % 5 == 0
        )
        collector.add(row, source=place % 2, file=f"{place % 2}.jsonl", line=place + 1)
    comparisons = collector.finish()
    assert comparisons is not None
    return comparisons


def rows_of(comparisons: Comparisons) -> list[tuple]:
    """Every row as plain values."""
    rows = []
    for index in range(len(comparisons)):
        answers, pairs = comparisons.answers([index]).tolist(), comparisons.pairs([index])
        rows.append(
            (
                comparisons.origin(index),
                int(comparisons.sources[index]),
                comparisons.condition(index),
                int(comparisons.twins[index]),
                bool(comparisons.cut[index]),
                tuple(tuple(comparisons.sequences.example(answer)[0].tolist()) for answer in answers),
                tuple(float(comparisons.sequences.example(answer)[1][-1]) for answer in answers),
                tuple(comparisons.starts[answers].tolist()),
                tuple(comparisons.better[pairs].tolist()),
                tuple(comparisons.worse[pairs].tolist()),
                tuple(comparisons.weights[pairs].tolist()),
                tuple(comparisons.margins[pairs].tolist()),
            )
        )
    return rows


def pairs_in(batch) -> list[tuple]:
    """Every pair of a batch as the tokens of its two segments, its weight and its margin."""
    segments = [tuple(batch.tokens_T[begin:end].tolist()) for begin, end in itertools.pairwise(batch.borders)]
    pairs = batch.pairs
    numbers = zip(
        *(part.tolist() for part in (pairs.better_P, pairs.worse_P, pairs.weights_P, pairs.margins_P)),
        strict=True,
    )
    return [(segments[better], segments[worse], weight, margin) for better, worse, weight, margin in numbers]


@pytest.fixture(scope="module")
def many() -> Comparisons:
    generator = np.random.default_rng(1)
    ranks = [tuple(sorted(generator.integers(0, 4, generator.integers(2, 6)).tolist())) for _ in range(60)]
    ranks = [row_ranks if row_ranks[0] != row_ranks[-1] else (0, 1) for row_ranks in ranks]
    return comparisons(ranks, weights=generator.uniform(0.2, 2, 60), margins=generator.uniform(0, 1, 60))


def test_a_ranked_list_makes_every_pair_once():
    assert pairs_of((0, 1), ties=False) == [(0, 1, 1.0)]
    pairs = pairs_of((0, 1, 2, 3), ties=False)
    assert [pair[:2] for pair in pairs] == list(itertools.combinations(range(4), 2))
    assert {share for *_, share in pairs} == {1 / 6}


def test_answers_of_one_rank_make_no_pair_or_one_each_way_at_half():
    assert [pair[:2] for pair in pairs_of((0, 0, 1), ties=False)] == [(0, 2), (1, 2)]
    shares = {(one, other): share for one, other, share in pairs_of((0, 0, 1), ties=True)}
    assert shares == {(0, 2): 1 / 3, (1, 2): 1 / 3, (0, 1): 1 / 6, (1, 0): 1 / 6}
    assert pairs_of((0, 0), ties=True) == [(0, 1, 0.5), (1, 0, 0.5)]


@pytest.mark.parametrize("ties", [False, True])
def test_the_shares_of_a_row_sum_to_one(ties):
    for ranks in itertools.combinations_with_replacement(range(3), 4):
        if ranks[0] != ranks[-1] or ties:
            assert sum(share for *_, share in pairs_of(ranks, ties)) == pytest.approx(1)


def test_a_prompt_counts_once_and_each_answer_once():
    rows = comparisons([(0, 1), (0, 1, 2, 3), (0, 0, 1)], weights=[1.0, 2.0, 0.5])
    sums = np.add.reduceat(rows.weights, rows.pair_offsets[:-1])
    assert sums.tolist() == pytest.approx([1.0, 2.0, 0.5])
    assert rows.totals([0]) == pytest.approx({"pairs": 1.0, "answers": 2.0})
    assert rows.totals([1]) == pytest.approx({"pairs": 2.0, "answers": 4 * 2.0})
    assert rows.totals([0, 1, 2]) == pytest.approx({"pairs": 3.5, "answers": 2 + 8 + 1.5})
    assert rows.totals([]) == {"pairs": 0.0, "answers": 0.0}


def test_rows_say_where_they_come_from(many):
    assert many.lengths.sum() == many.sequences.lengths.sum()
    assert len(many.lengths) == len(many.sources) == len(many.twins) == len(many.cut) == len(many) == 60
    assert many.origin(7) == "1.jsonl:8"
    assert [many.condition(index) for index in range(3)] == ["brief", "long", None]


def test_taking_rows_keeps_all_they_hold(many):
    rows = rows_of(many)
    for chosen in ([3], [5, 0, 5], np.arange(59, -1, -1), []):
        if len(chosen):
            assert rows_of(many.take(chosen)) == [rows[index] for index in chosen]
    assert rows_of(many.take([9, 4, 2]).take([2, 0])) == [rows[2], rows[9]]


@pytest.mark.parametrize("tokens_per_pass", [25, 40, 1000])
def test_packing_loses_nothing_and_pairs_point_at_their_answers(many, tokens_per_pass):
    batches = [gather(many, group) for group in pack_all(many.lengths, tokens_per_pass)]
    assert all(len(batch.tokens_T) <= tokens_per_pass for batch in batches)
    pairs = Counter(pair for batch in batches for pair in pairs_in(batch))
    expected: Counter = Counter()
    for row in rows_of(many):
        tokens, (better, worse, weights, margins) = row[5], row[8:]
        expected.update(
            (tokens[one], tokens[other], weight, margin)
            for one, other, weight, margin in zip(better, worse, weights, margins, strict=True)
        )
    assert pairs == expected
    segments = Counter(
        tuple(batch.tokens_T[begin:end].tolist())
        for batch in batches
        for begin, end in itertools.pairwise(batch.borders)
    )
    assert segments == Counter(tokens for row in rows_of(many) for tokens in row[5])


def test_a_batch_learns_at_the_last_token_of_every_segment(many):
    batch = gather(many, [4, 1, 8])
    assert batch.learned_N.tolist() == [end - 1 for end in batch.borders[1:]]
    expected = [weight for index in (4, 1, 8) for weight in rows_of(many)[index][6]]
    assert batch.weights_N.tolist() == expected
    moved = batch.to(batch.tokens_T.device)
    assert pairs_in(moved) == pairs_in(batch)
    assert {"better_P", "worse_P", "weights_P", "margins_P", "tokens_T"} < set(batch.tensors())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_steps_of_a_run_hold_every_row_once_whatever_the_passes(many, world):
    streams = [
        make_stream(many, tokens_per_step=120, tokens_per_pass=size, epochs=1.0, seed=0) for size in (120, 30)
    ]
    for stream in streams:
        assert sorted(index for step in stream.steps for index in step.samples.tolist()) == list(range(60))
    for step in range(len(streams[0].steps)):
        held = []
        for stream in streams:
            batches = [batch for rank in range(world) for batch in stream.batches(step, Share(rank, world))]
            held.append(Counter(pair for batch in batches for pair in pairs_in(batch)))
            totals = stream.totals(step)
            weights = sum(float(batch.pairs.weights_P.sum()) for batch in batches if batch.pairs)
            assert totals["pairs"] == pytest.approx(weights, rel=1e-5)
            answers = sum(float(batch.weights_N.sum()) for batch in batches)
            assert totals["answers"] == pytest.approx(answers, rel=1e-5)
        assert held[0] == held[1]


def test_the_fingerprint_is_of_what_the_loss_depends_on(many):
    assert many.fingerprint() == many.take(np.arange(60)).fingerprint()
    assert many.fingerprint() != many.take(np.arange(59, -1, -1)).fingerprint()
    plain = comparisons([(0, 1), (0, 1, 2)])
    for other in (
        comparisons([(0, 1), (0, 0, 1)]),
        comparisons([(0, 1), (0, 1, 2)], weights=[1.0, 2.0]),
        comparisons([(0, 1), (0, 1, 2)], margins=[0.0, 0.5]),
    ):
        assert other.fingerprint() != plain.fingerprint()


def test_nothing_gathered_is_nothing():
    assert ComparisonCollector(NAMES, ties=False).finish() is None
