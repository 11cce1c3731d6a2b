"""From a step's number to its packed rows: complete, exact totals, no target across borders."""

import numpy as np
import pytest

from tuner.config import ShortRows
from tuner.data.batch import make_batch
from tuner.data.examples import Examples, Origins
from tuner.data.packing import Share
from tuner.data.stream import make_stream


def examples(lengths, seed=0) -> Examples:
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    weights = generator.choice([0.0, 0.5, 1.0], offsets[-1]).astype(np.float32)
    weights[offsets[:-1]] = 0
    count = len(lengths)
    return Examples(
        generator.integers(0, 100, offsets[-1]).astype(np.int32), weights, offsets, np.zeros(count, np.int32),
        Origins(("rows.jsonl",), np.zeros(count, np.int32), np.arange(1, count + 1)),
    )  # fmt: skip


def stream(tokens_per_pass, lengths=tuple(range(2, 40))):
    return make_stream(
        examples(lengths), tokens_per_step=128, tokens_per_pass=tokens_per_pass, epochs=2.0, seed=0
    )


def targets(batch):
    return zip(batch.tokens_T[batch.learned_N].tolist(), batch.weights_N.tolist(), strict=True)


def test_a_row_by_hand():
    tokens = [np.asarray(row, np.int32) for row in ([7, 8, 9], [4, 5])]
    batch = make_batch(
        [(tokens[0], np.asarray([1, 0, 2], np.float32)), (tokens[1], np.asarray([3, 0.5], np.float32))]
    )
    assert batch.tokens_T.tolist() == [7, 8, 9, 4, 5]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.borders == (0, 3, 5)
    assert batch.learned_N.tolist() == [
        2,
        4,
    ]  # first tokens are never targets: in a pack, another sample precedes
    assert batch.weights_N.tolist() == [2.0, 0.5]
    assert batch.longest == 3


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("tokens_per_pass", [40, 64, 128])
def test_every_split_of_a_step_holds_the_same_targets(tokens_per_pass, world):
    whole, split = stream(128), stream(tokens_per_pass)
    for step in range(len(whole.steps)):
        pairs = []
        for one, ranks in ((whole, 1), (split, world)):
            batches = [batch for rank in range(ranks) for batch in one.batches(step, Share(rank, ranks))]
            assert all(len(batch.tokens_T) <= one.tokens_per_pass for batch in batches)
            pairs.append(sorted(pair for batch in batches for pair in targets(batch)))
        assert pairs[0] == pairs[1]
        assert whole.totals(step)["tokens"] == pytest.approx(sum(weight for _, weight in pairs[0]))
        assert whole.tokens(step) == sum(len(batch.tokens_T) for batch in whole.contents(step).batches)


def test_a_rank_may_have_no_pass():
    assert stream(128, (100,)).batches(0, Share(1, 2)) == []


def test_short_rows_without_shares_of_sources():
    """Short rows come first where they have nearly all tokens, and their end is said."""
    lengths = (*[10] * 40, *[30] * 40)
    plan = make_stream(
        examples(lengths), tokens_per_step=120, tokens_per_pass=120, epochs=1.0, seed=0,
        short_rows=ShortRows(below=20, share=0.9),
    )  # fmt: skip
    order = [length for step in plan.steps for length in plan.lengths[step.samples].tolist()]
    assert sorted(order) == sorted(lengths)
    assert sum(length for length in order[:30] if length < 20) / sum(order[:30]) > 0.75
    (ends,) = plan.exhausted.values()
    assert ends == ["all files (rows of under 20 tokens)"]
