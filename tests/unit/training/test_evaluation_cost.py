"""Evaluations that cost much of a run are said, once."""

from tuner.training.evaluation_cost import EvaluationCost


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
