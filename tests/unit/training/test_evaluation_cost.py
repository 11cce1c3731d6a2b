"""Evaluations cost a tenth of a run by default; where the config has them cost more, it is said, once."""

import pytest

from tuner.training.evaluation_cost import EvaluationCost, evaluation_interval, interval_sentences


@pytest.mark.parametrize(
    ("evaluation_tokens", "interval"),
    [
        (0, 10),
        # A tenth of the run is 30,000 tokens of forward passes: a token that is trained on costs three.
        (3_000, 10),
        (3_001, 12),
        (10_000, 34),
        (30_000, 100),
        (1_000_000, 100),
    ],
)
def test_evaluations_are_ten_over_the_run_or_as_many_as_cost_a_tenth_of_it(evaluation_tokens, interval):
    assert evaluation_interval(100, evaluation_tokens, 100_000) == interval


def test_short_runs_are_evaluated_after_every_step_where_that_is_cheap():
    assert evaluation_interval(3, 10, 1_000) == 1


def test_fewer_than_ten_are_said():
    assert interval_sentences(100, 10) == interval_sentences(3, 1) == []
    assert interval_sentences(100, 34)[0].startswith("held-out rows are evaluated 3 times over the run: 10 ")
    assert interval_sentences(100, 100)[0].startswith(
        "held-out rows are evaluated once, at the end of the run"
    )


def test_a_share_above_a_tenth_is_said_once() -> None:
    cost = EvaluationCost()
    assert cost.add(6.0, 20.0) == []  # too little time to matter
    (sentence,) = cost.add(6.0, 60.0)
    assert sentence.startswith("evaluations have taken 20% of the time so far (12 of 60 s)")
    assert cost.add(60.0, 120.0) == []


def test_a_small_share_is_not() -> None:
    cost = EvaluationCost()
    assert cost.add(20.0, 200.0) == []
    assert cost.add(20.0, 500.0) == []
