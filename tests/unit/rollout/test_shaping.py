"""What the policy learns of a score: penalty, clip, and the run's own moments; against numpy over all scores."""

import json

import numpy as np
import pytest

from tuner.config import PPO, LengthPenalty, Prompts, Sampling, override
from tuner.losses.moments import RunningMoments
from tuner.rollout.shaping import length_penalties, shape_scores

CONFIG = PPO(
    policy={"path": "none"},
    reward="none",
    prompts=Prompts(files=("none.jsonl",), template="internlm2", max_length=8),
    sampling=Sampling(max_new_tokens=8),
)
SCORES = np.array([0.5, -7.0, 9.0, 0.0])
ENDED = np.array([True, True, False, False])


def learned(scores=SCORES, ended=ENDED, kept=None, **changes):
    config = override(CONFIG, changes)
    found, after = shape_scores(
        scores,
        ended,
        kept or {},
        missing_end_penalty=config.missing_end_penalty,
        clip=config.reward_clip,
        normalize=config.normalize_rewards,
    )
    return found.tolist(), after


def test_scores_are_clipped_then_normalised():
    clipped = SCORES.clip(-5, 5)
    found, kept = learned()
    assert found == pytest.approx(((clipped - clipped.mean()) / (clipped.std() + 1e-8)).tolist())
    assert kept["count"] == 4
    assert kept["mean"] == pytest.approx(clipped.mean())
    assert kept["squares"] == pytest.approx(4 * clipped.var())


def test_without_normalisation_the_score_itself_is_learned():
    assert learned(normalize_rewards=False)[0] == [0.5, -5.0, 5.0, 0.0]
    assert learned(normalize_rewards=False, reward_clip=None)[0] == SCORES.tolist()
    assert learned(normalize_rewards=False, reward_clip=0.25)[0] == [0.25, -0.25, 0.25, 0.0]


def test_a_missing_end_is_taken_off_before_the_clip():
    changes = {"normalize_rewards": False, "missing_end_penalty": 2.0}
    assert learned(**changes)[0] == [0.5, -5.0, 5.0, -2.0]
    assert learned(reward_clip=None, **changes)[0] == [0.5, -7.0, 7.0, -2.0]
    assert SCORES.tolist() == [0.5, -7.0, 9.0, 0.0]  # and what is logged as the score stays raw


def test_the_penalty_on_length_by_hand():
    """DAPO's soft overlong punishment: 0 up to 6 tokens, -1 at 10."""
    lengths = np.array([1, 6, 7, 10])
    costs = length_penalties(lengths, LengthPenalty(per_token=1 / 4, above=6))
    assert costs.tolist() == [0, 0, 0.25, 1.0]
    assert length_penalties(lengths, LengthPenalty(per_token=0.5)).tolist() == [0.5, 3.0, 3.5, 5.0]
    assert length_penalties(lengths, None).tolist() == [0.0] * 4
    shaped, _ = shape_scores(
        *(SCORES, ENDED, {}),
        missing_end_penalty=1.0,
        length_penalties_A=costs,
        clip=5.0,
        normalize=False,
    )
    assert shaped.tolist() == [0.5, -5.0, 5.0, -2.0]


def test_moments_are_those_of_all_scores_so_far_this_steps_too():
    draw = np.random.default_rng(0)
    steps = [draw.normal(3, 2, count) for count in (1, 7, 1, 32)]
    kept = {}
    for number, scores in enumerate(steps):
        found, kept = learned(scores, np.ones(len(scores), bool), kept)
        kept = json.loads(json.dumps(kept))
        all_so_far = np.concatenate(steps[: number + 1]).clip(-5, 5)
        spread = all_so_far.std() + 1e-8
        assert found == pytest.approx(((scores.clip(-5, 5) - all_so_far.mean()) / spread).tolist(), abs=1e-6)


def test_far_from_zero_moments_lose_no_digits():
    draw = np.random.default_rng(0)
    steps = [1e6 + draw.normal(0, 1e-3, 50) for _ in range(20)]
    moments = RunningMoments()
    for scores in steps:
        moments = moments.merged(scores)
    assert moments.std == pytest.approx(np.concatenate(steps).std(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.3, -4.9])
def test_equal_scores_are_no_better_than_each_other(value):
    """A score of 0.0 is a score; a spread of 0 divides nothing."""
    found, kept = learned(np.full(5, value), np.ones(5, bool))
    assert found == [0.0] * 5
    assert kept["count"] == 5
    found, kept = learned(np.full(5, value), np.ones(5, bool), kept)
    assert found == pytest.approx([0.0] * 5, abs=1e-6)


def test_kept_is_not_changed_in_place():
    kept = {"count": 2, "mean": 1.0, "squares": 0.5}
    learned(kept=kept)
    assert kept == {"count": 2, "mean": 1.0, "squares": 0.5}
