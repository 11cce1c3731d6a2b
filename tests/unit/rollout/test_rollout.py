"""A rollout's packed rows: every answer once, its own tokens learned, whatever the pass and the ranks."""

import numpy as np
import pytest
import torch

from tuner.data.conversation import Prompt, Turn
from tuner.data.packing import Share
from tuner.models.generate import Answer
from tuner.rollout.rollout import Rollout
from tuner.rollout.rollout_figures import repetition

PROMPTS = (4, 9, 2, 30, 6, 1, 12, 3)
ANSWERS = (1, 5, 8, 2, 1, 8, 3, 4)


class Alone:
    """Devices of one process among `world`."""

    device = torch.device("cpu")

    def __init__(self, rank: int = 0, world: int = 1, equal: bool = False) -> None:
        self.share = Share(rank, world, equal)


def rollout(prompts=PROMPTS, answers=ANSWERS) -> Rollout:
    """Prompts are tokens below 1000, the t-th token of answer i is 1000 + 100 i + t."""
    draw = np.random.default_rng(0)
    tokens = [draw.integers(1, 1000, length).astype(np.int32) for length in prompts]
    made = [
        Answer(np.arange(length, dtype=np.int32) + 1000 + 100 * number, length < 8, np.zeros(length))
        for number, length in enumerate(answers)
    ]
    asked = [Prompt((Turn("user", "x"),))] * len(tokens)
    return Rollout(asked, tokens, made, [""] * len(tokens))


def all_rows(made: Rollout, mini_batches: int, tokens_per_pass: int, world: int):
    return [
        row
        for rank in range(world)
        for row in made.rows(mini_batches, tokens_per_pass, Alone(rank, world))  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 20])
@pytest.mark.parametrize("tokens_per_pass", [32, 48, 1000])
@pytest.mark.parametrize("mini_batches", [1, 2, 3, 8])
def test_every_answer_is_in_one_row(mini_batches, tokens_per_pass, world):
    made = rollout()
    rows = all_rows(made, mini_batches, tokens_per_pass, world)
    assert sorted(index for row in rows for index in row.answers.tolist()) == list(range(len(made)))
    parts = [part.tolist() for part in np.array_split(np.arange(len(made)), mini_batches)]
    for row in rows:
        assert len(row.batch.tokens_T) <= tokens_per_pass
        assert set(row.answers.tolist()) <= set(parts[row.mini_batch])
        learned = row.batch.tokens_T[row.batch.learned_N].tolist()
        assert set(row.batch.weights_N.tolist()) == {1.0}
        for place, index in enumerate(row.answers.tolist()):  # borders are those of the learned tokens
            own = learned[row.borders[place] : row.borders[place + 1]]
            assert own == made.answers[index].tokens.tolist()
        assert row.borders[-1] == len(learned)
        for place, index in enumerate(row.answers.tolist()):  # and a segment is a prompt with its answer
            segment = row.batch.tokens_T[row.batch.borders[place] : row.batch.borders[place + 1]].tolist()
            assert segment == [*made.tokens[index].tolist(), *made.answers[index].tokens.tolist()]


def test_a_token_is_predicted_from_within_its_own_segment():
    """The state before an answer's first token is that of its prompt's last one; prompts of one token too."""
    for row in all_rows(rollout(), 1, 1000, 1):
        starts = np.asarray(row.batch.borders)
        owner = np.searchsorted(starts, row.batch.learned_N.numpy(), side="right")
        before = np.searchsorted(starts, row.batch.learned_N.numpy() - 1, side="right")
        assert np.array_equal(owner, before)


def test_mini_batches_without_a_prompt_are_none():
    made = rollout(PROMPTS[:3], ANSWERS[:3])
    assert [part.tolist() for part in made.mini_batches(8)] == [[0], [1], [2]]


def test_more_ranks_than_rows_leave_some_without():
    made = rollout()
    assert made.rows(1, 1000, Alone(1, 2)) == []  # type: ignore[arg-type]


def test_lengths_and_ends():
    made = rollout()
    assert made.answer_lengths.tolist() == list(ANSWERS)
    assert made.lengths.tolist() == [one + other for one, other in zip(PROMPTS, ANSWERS, strict=True)]
    assert made.ended.tolist() == [length < 8 for length in ANSWERS]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),  # too short to have a phrase
        ([1, 2, 3, 4], 0.0),
        ([1, 1, 1, 1, 1], 0.5),  # two phrases, the second as the first
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        (list(range(20)), 0.0),
    ],
)
def test_repetition_by_hand(tokens, expected):
    assert repetition(np.asarray(tokens, np.int32)) == pytest.approx(expected)
