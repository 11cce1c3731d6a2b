"""One score from several reward models, and a reward by comparison with the reference's answers; by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuner.config import LengthPenalty, PreferenceReward
from tuner.data.conversation import Prompt, Turn
from tuner.data.rollout_rows import read_rollout, rollout_row
from tuner.models.generate import Answer
from tuner.models.reward_record import Reference
from tuner.rollout.engine import LocalEngine
from tuner.rollout.reference_answers import ReferenceAnswers
from tuner.rollout.reward_sources import EnsembleReward, RuleReward, SummedReward, combined
from tuner.rollout.rollout import Rollout
from tuner.rollout.rules import load_rule
from tuner.rollout.shaping import preferences, shape_scores
from tuner.training.devices import Devices

MODELS_KA = np.array([[1.0, 0.0, -2.0], [3.0, 0.0, 2.0], [2.0, 3.0, 0.0]])
PROMPTS = [Prompt((Turn("user", "How many?"),), origin="rows.jsonl:1")] * 3
TEXTS = ["1", "4", "7"]


def number(answer: str, row: dict[str, Any]) -> float:
    return float(answer)


def tens(answer: str, row: dict[str, Any]) -> float:
    return 100 - 10 * float(answer)


def rule(name: str, weight: float = 1.0) -> RuleReward:
    function = load_rule(f"{Path(__file__)}:{name}", "reward")
    assert function is not None
    return RuleReward(function, name, weight, Devices(device="cpu", precision="fp32"))


def ensemble(combine: str) -> EnsembleReward:
    """Of 1, 4, 7 the scores are -1, 0, 1 by the first and 3, 0, -3 by the second."""
    references = [Reference(4.0, 3.0, answers=5), Reference(60.0, 10.0, answers=5)]
    return EnsembleReward([rule("number"), rule("tens")], references, combine, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("mean", [2.0, 1.0, 0.0]),
        ("min", [1.0, 0.0, -2.0]),
        # variances over the three models: 2/3, 2, 8/3
        ("mean_minus_variance", [2 - 0.5 * 2 / 3, 1 - 0.5 * 2, 0 - 0.5 * 8 / 3]),
    ],
)
def test_three_scores_become_one(combine, expected):
    assert combined(MODELS_KA, combine, 0.5).tolist() == pytest.approx(expected, rel=1e-12)


def test_each_model_is_standardized_by_its_own_reference():
    scores = ensemble("min").detailed(PROMPTS, TEXTS)
    assert scores.models_KA.tolist() == [[-1.0, 0.0, 1.0], [3.0, 0.0, -3.0]]
    assert scores.total_A.tolist() == [-1.0, 0.0, -3.0] == ensemble("min").score(PROMPTS, TEXTS).tolist()
    assert ensemble("mean").score(PROMPTS, TEXTS).tolist() == [1.0, 0.0, -1.0]
    assert scores.models_of(2) == [1.0, -3.0]
    assert scores.figures() == {"disagreement": pytest.approx((2 + 0 + 2) / 3)}


def test_a_sum_keeps_what_its_ensemble_says():
    summed = SummedReward({"reward": ensemble("mean"), "length": rule("number", weight=0.1)})
    scores = summed.detailed(PROMPTS, TEXTS)
    assert scores.total_A.tolist() == pytest.approx([1.1, 0.4, -0.3])
    assert scores.models_of(0) == [-1.0, 3.0]
    assert scores.figures() == pytest.approx(
        {"score_of/reward": 0.0, "score_of/length": 0.4, "disagreement": 4 / 3}
    )
    alone = rule("number").detailed(PROMPTS, TEXTS)
    assert (alone.figures(), alone.models_of(0)) == ({}, None)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_a_preference_is_the_mean_of_sigmoids():
    scores_A, references_AM = np.array([1.0, -2.0]), np.array([[0.0, 3.0], [-2.0, -2.0]])
    one = preferences(scores_A, references_AM[:, :1], PreferenceReward())
    assert one.tolist() == pytest.approx([sigmoid(1), 0.5], rel=1e-12)
    two = preferences(scores_A, references_AM, PreferenceReward(answers=2, slope=2.0))
    assert two.tolist() == pytest.approx([(sigmoid(2) + sigmoid(-4)) / 2, 0.5], rel=1e-12)
    far = preferences(np.array([2e3, -2e3, math.nan]), np.zeros((3, 1)), PreferenceReward())
    assert far.tolist() == pytest.approx([1.0, 0.0, math.nan], nan_ok=True)


def test_penalties_come_before_the_comparison():
    shaped_A, moments = shape_scores(
        np.array([1.0, 1.0]),
        np.array([True, False]),
        {},
        missing_end_penalty=3.0,
        length_penalties_A=np.array([0.5, 0.0]),
        clip=None,
        normalize=False,
        preference=lambda scores_A: preferences(scores_A, np.zeros((2, 1)), PreferenceReward()),
    )
    assert shaped_A.tolist() == pytest.approx([sigmoid(0.5), sigmoid(-2)])
    assert moments["count"] == 2


def test_the_references_answers_have_the_same_penalties():
    """Two answers of the reference to each of two prompts, compared with three of the policy's."""
    engine = LocalEngine(None, (), None, 0, 8, None, role="reference")  # type: ignore[arg-type]
    references = ReferenceAnswers(
        engine, 2, missing_end_penalty=1.0, length_penalty=LengthPenalty(per_token=0.1)
    )
    answers = [
        Answer(np.zeros(length, np.int32), ended, np.zeros(length, np.float32))
        for length, ended in ((1, True), (2, False), (5, True), (10, True))
    ]
    rollout = Rollout(PROMPTS, [], answers, [], answers_per_prompt=2)
    compared_AM = references.compared(np.array([0.0, 1.0, 2.0, 3.0]), rollout, answers_per_prompt=3)
    np.testing.assert_allclose(compared_AM, [[-0.1, -0.2]] * 3 + [[1.5, 2.0]] * 3, atol=1e-12)


def test_a_row_of_an_ensemble_is_read_like_any_other():
    row = rollout_row(PROMPTS[0], "4", number=0, score=0.5, gold=None, ended=True, scores=[1.0, 0.0])
    plain = rollout_row(PROMPTS[0], "4", number=0, score=0.5, gold=None, ended=True)
    assert row == plain | {"scores": [1.0, 0.0]}
    assert read_rollout(row, "here") == read_rollout(plain, "here")
