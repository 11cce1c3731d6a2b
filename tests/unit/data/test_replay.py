"""Replayed rows: in proportion to the rollouts, whole, in one order, whatever the rank or the pass."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.data.test_stream import examples
from tuner.config import Source
from tuner.data.examples import Examples
from tuner.data.packing import Share
from tuner.data.replay import ReplayStream

LENGTHS = (5, 17, 3, 40, 8, 8, 22, 2, 11, 30)


def stream(lengths=LENGTHS, ratio=0.5, sources=(), seed=0, tokens_per_pass=48) -> ReplayStream:
    return ReplayStream(examples(lengths), sources, ratio, tokens_per_pass, seed)


def run(replay: ReplayStream, rollouts, cursor=None) -> tuple[list[list[int]], dict]:
    """The rows of every step, and the last cursor."""
    cursor, drawn = cursor or {}, []
    for tokens in rollouts:
        rows, cursor = replay.draw(cursor, tokens)
        cursor = json.loads(json.dumps(cursor))  # as a checkpoint has it
        drawn.append(rows)
    return drawn, cursor


def test_by_hand():
    """Rows of 10 tokens at a half: 15 tokens owe 7.5, and no row; 30 in all owe 15, and one."""
    drawn, cursor = run(stream((10, 10, 10)), (15, 15, 9))
    order = np.random.default_rng((0, 0)).permutation(3).tolist()
    assert drawn == [[], [order[0]], []]
    assert cursor == {"drawn": 1, "owed": pytest.approx(9.5)}
    assert run(stream((10, 10, 10)), (1,), cursor)[0] == [
        [order[1]]
    ]  # a row as long as what is owed is drawn


def test_a_row_longer_than_what_is_owed_waits_for_its_turn():
    """Nor does a shorter one overtake it: long rows would never come."""
    replay = stream((100, 2, 2, 2), ratio=1.0)
    order = np.random.default_rng((0, 0)).permutation(4).tolist()
    place = order.index(0)
    drawn, _ = run(replay, [10] * 12)
    flat = [row for rows in drawn for row in rows]
    assert flat[: place + 1] == order[: place + 1]
    step = next(number for number, rows in enumerate(drawn) if 0 in rows)
    assert 10 * (step + 1) >= 100 + 2 * place
    assert all(not rows for rows in drawn[max(1, place) : step])


@pytest.mark.parametrize("lengths", [(3,), (50, 60, 70), LENGTHS])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.7])
def test_the_ratio_is_kept_over_a_run_however_long_the_rows(lengths, ratio):
    rollouts = np.random.default_rng(3).integers(1, 90, 200).tolist()
    replay = stream(lengths, ratio)
    drawn, cursor = run(replay, rollouts)
    tokens = sum(lengths[row] for rows in drawn for row in rows)
    assert 0 <= ratio * sum(rollouts) - tokens < max(lengths)
    assert cursor["owed"] == pytest.approx(ratio * sum(rollouts) - tokens, abs=1e-6)


def test_the_order_is_that_of_shuffled_epochs():
    drawn, cursor = run(stream(seed=5), [77] * 40)
    flat = [row for rows in drawn for row in rows]
    orders = [np.random.default_rng((5, epoch)).permutation(len(LENGTHS)) for epoch in range(20)]
    assert flat == np.concatenate(orders)[: len(flat)].tolist()
    assert cursor["drawn"] == len(flat) > 2 * len(LENGTHS)
    assert flat != [row for rows in run(stream(seed=6), [77] * 40)[0] for row in rows]


@pytest.mark.parametrize("sources", [(), (Source(path="a", share=3), Source(path="b", share=1))])
def test_what_is_kept_is_all_that_resuming_needs(sources):
    """Cut anywhere, a new stream goes on as if it had not been."""
    rollouts = np.random.default_rng(1).integers(1, 200, 12).tolist()
    replay = mix(sources)
    whole, end = run(replay, rollouts)
    for cut in range(len(rollouts)):
        first, cursor = run(mix(sources), rollouts[:cut])
        rest, last = run(mix(sources), rollouts[cut:], cursor)
        assert first + rest == whole
        assert last == end


def mix(sources) -> ReplayStream:
    replay = stream(sources=sources)
    examples = replace(replay.examples, sources=(np.arange(len(LENGTHS)) % 2).astype(np.int32))
    return replace(replay, examples=examples)


def test_drawing_does_not_change_the_cursor():
    replay, cursor = stream(), {"drawn": 3, "owed": 4.0}
    assert replay.draw(cursor, 100) == replay.draw(cursor, 100)
    assert cursor == {"drawn": 3, "owed": 4.0}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("tokens_per_pass", [40, 64, 400])
def test_every_row_is_trained_on_once_by_any_rank(world, tokens_per_pass):
    replay, rows = stream(tokens_per_pass=tokens_per_pass), [3, 0, 7, 3, 9]
    batches = [batch for rank in range(world) for batch in replay.batches(rows, Share(rank, world))]
    assert all(len(batch.tokens_T) <= tokens_per_pass for batch in batches)
    replayed = sorted(
        tuple(batch.tokens_T[start:end].tolist())
        for batch in batches
        for start, end in zip(batch.borders, batch.borders[1:], strict=False)
    )
    assert replayed == sorted(tuple(replay.examples.example(row)[0].tolist()) for row in rows)
    weight = sum(float(batch.weights_N.sum()) for batch in batches)
    assert replay.target_weight(rows) == pytest.approx(weight)


def test_the_target_weight_is_that_of_the_rows():
    """Weights of 1, a half and 0 count as what they are; a total over all ranks."""
    replay = stream()
    rows: Examples = replay.examples
    for chosen in ([], [2], [0, 3, 3]):
        assert replay.target_weight(chosen) == sum(float(rows.example(row)[1].sum()) for row in chosen)
