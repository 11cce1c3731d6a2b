"""What is said of a policy, by figures made up here."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from tuner.rollout.health import Health, chance_of_mean
from tuner.rollout.rollout_figures import gold_auc

SOUND = {"kl": 0.01, "kl_k3": 0.01, "ended": 0.9}


def judged(
    steps: list[dict[str, float]],
    grad_norms: list[float] | None = None,
    num_best: int = 6,
    others: Sequence[str] = (),
) -> list[tuple[int, str]]:
    """(step, sentence) of all that is said; the state goes through JSON at every step, as in a killed run."""
    state, said = {}, []
    for number, figures in enumerate(steps):
        health = Health.of(json.loads(json.dumps(state)))
        norm = 1.0 if grad_norms is None else grad_norms[number]
        signs = health.judge(figures, True, norm, ["So say the wise."] * num_best, others)
        said += [(number, sign.sentence) for sign in signs]
        state = health.to_state()
    return said


def test_a_sound_run_is_silent():
    assert judged([SOUND | {"kl_k3": 0.0}, *[SOUND] * 20]) == []


def test_an_explosion_is_said_at_each_limit_once():
    said = judged([SOUND, *[SOUND | {"kl": kl} for kl in (0.9, 1.5, 2.0, 14.8, 15.0, 0.1, 3.0)]])
    assert [step for step, _ in said] == [2, 4]
    assert "1.5 nats a token" in said[0][1]
    assert "14.8 nats a token" in said[1][1]
    assert "max_kl" in said[0][1]


def test_answers_that_no_longer_end_are_said():
    said = judged([SOUND | {"ended": ended} for ended in (0.8, 0.9, 0.3, 0.2, 0.0)])
    assert [step for step, _ in said] == [3]
    assert "20% of the answers end within max_new_tokens, where 90% did before" in said[0][1]
    assert judged([SOUND | {"ended": ended} for ended in (0.4, 0.0, 0.0)]) == []  # they never did


def test_a_policy_that_never_moved_is_said():
    said = judged([SOUND | {"kl_k3": 1e-9}] * 9)
    assert [step for step, _ in said] == [5]
    assert "the policy has hardly moved" in said[0][1]


def test_a_gradient_of_zero_is_said_without_a_reference():
    said = judged([{"ended": 0.9}] * 9, [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert [step for step, _ in said] == [6]
    assert "the policy's gradient was 0 in the last 3 steps" in said[0][1]


def best(*sixths: int) -> list[dict[str, float]]:
    """Steps in which so many of the six best-scored answers are right."""
    return [SOUND | {"gold_top_tenth": right / 6} for right in sixths]


def test_gold_that_leaves_the_best_scored_answers_is_said_once():
    said = judged(best(5, 5, 6, 4, 1, 5, 6, 5, 1, 0, 1, 0, 5, 5, 0, 0))
    assert [step for step, _ in said] == [9], "a single low step is chance"
    assert "gold among the best-scored tenth is at most 0.17 in the last 2 steps" in said[0][1]
    assert "the mean of all earlier ones is 0.70" in said[0][1]
    assert "raise kl" in said[0][1]
    assert "look at" not in said[0][1]
    ((_, sentence),) = judged(best(6, 6, 6, 0, 0, 0), others=["So they say.", "So say the wise.", "5.", "6."])
    assert sentence.endswith(
        "look at 'so say the wise', which stands in 100% of the best-scored tenth, 25% of the other answers"
    )
    # 12 answers of which one is right are less of a surprise where two of three were
    assert [step for step, _ in judged(best(4, 4, 5, 4, 4, 3, 5, 3, 1, 0, 1, 0, 0))] == [11]


def test_gold_that_was_never_among_the_best_scored_cannot_leave_them():
    """Where right answers are rare, or the reward model never preferred them."""
    assert judged(best(0, 0, 0, 1, 0, 2, 0, 0, 1, 0, 0, 3, 0, 0)) == []
    assert judged([SOUND | {"gold_top_tenth": None}] * 5 + [SOUND] * 5) == []


def test_small_tenths_need_more_steps_to_speak():
    """The best tenth of ten answers is one of them: that it is wrong twice in a row is nothing."""
    steps = best(6, 6, 6, 6, 0) * 9 + best(0) * 12
    assert [[step for step, _ in judged(steps, num_best=count)] for count in (1, 2, 6, 51)] == [
        *([51], [47], [45], [45])
    ]


def test_gold_that_does_not_change_is_silent():
    """In 3,000 steps of 60 runs each, whatever the rate of right answers and the size of the tenth."""
    draw = np.random.default_rng(0)
    for rate, count in ((0.1, 6), (0.4, 6), (0.6, 6), (0.8, 1), (0.6, 51)):
        shares = draw.binomial(count, rate, (60, 50)) / count
        runs = [[SOUND | {"gold_top_tenth": share} for share in run] for run in shares.tolist()]
        assert sum(bool(judged(run, num_best=count)) for run in runs) == 0, (rate, count)


def aucs(*values: float, gold: float = 0.25) -> list[dict[str, float]]:
    """Steps of which the score orders right and wrong answers so well."""
    return [SOUND | {"gold": gold, "gold_auc": value} for value in values]


def judged_aucs(steps: list[dict[str, float]]) -> list[tuple[int, str]]:
    """Of 64 answers each."""
    return judged(steps, num_best=6, others=["6."] * 58)


def test_a_score_that_no_longer_tells_right_answers_from_wrong_ones_is_said_once():
    steps = aucs(0.9, 0.8, 0.95, 0.85, 0.7, 0.6, 0.62, 0.5, 0.4, 0.3, 0.2, 0.1)
    ((step, sentence),) = judged_aucs(steps)
    assert step == 9, "the first of which the last three have a mean of at most 0.5"
    assert (
        "(gold_auc) is 0.40 in the last 3 steps, and was 0.77 before; the policy begins to exploit"
        in sentence
    )
    assert [step for step, _ in judged_aucs(steps[:8] + aucs(0.9) + steps[8:])] == [11], (
        "a step alone is chance"
    )


def test_an_order_that_was_never_there_or_only_fades_is_silent():
    """A reward model that knows nothing of the rule, and a policy that comes to make only mistakes nobody sees."""
    assert judged_aucs(aucs(*[0.5, 0.55, 0.45, 0.4] * 20)) == []
    assert judged_aucs(aucs(*np.linspace(0.98, 0.52, 60).tolist())) == []
    assert judged_aucs([SOUND | {"gold": 0.0, "gold_auc": None}] * 9) == []
    few = aucs(0.9, 0.8, 0.9, 0.8, 0.9, 0.2, 0.5, 0.3, gold=0.02)
    assert judged_aucs(few) == [], "of one right answer, any order is chance"


@pytest.mark.parametrize(
    ("values", "suspicious"),
    [
        ([0.5, 0.55, 0.45, 0.4] * 5, []),
        ([0.9, 0.8, 0.95, 0.85, 0.45, 0.8, 0.7, 0.4, 0.3], [4, 7, 8]),
    ],
    ids=["never there", "lost"],
)
def test_a_step_is_suspicious_where_an_order_that_was_there_is_lost(values, suspicious):
    health = Health()
    for number, step in enumerate(aucs(*values)):
        health.judge(step, True, 1.0, ["5."] * 6, ["6."] * 58)
        assert health.suspicious == (number in suspicious), number


def test_an_order_that_does_not_change_is_silent():
    """In 3,000 steps of 60 runs each, whatever the rate of right answers and how well they are ordered."""
    draw = np.random.default_rng(1)
    for rate, shift in ((0.1, 0.0), (0.3, 0.5), (0.5, 1.5)):
        for _ in range(60):
            right_SA = draw.random((50, 64)) < rate
            scores_SA = draw.normal(size=(50, 64)) + shift * right_SA
            steps = [
                SOUND | {"gold": right_A.mean(), "gold_auc": gold_auc(scores_A, right_A.astype(float))}
                for scores_A, right_A in zip(scores_SA, right_SA, strict=True)
            ]
            assert judged_aucs(steps) == [], (rate, shift)


def test_the_chance_of_a_mean_bounds_the_binomial_one():
    exact = sum(math.comb(12, right) * 0.6**right * 0.4 ** (12 - right) for right in range(3))
    assert exact < chance_of_mean(2 / 12, 0.6, 12) < 5 * exact
    assert chance_of_mean(0.0, 0.5, 10) == pytest.approx(0.5**10)
    assert (chance_of_mean(0.5, 0.5, 9), chance_of_mean(0.1, 0.5, 0), chance_of_mean(0.1, 1.0, 9)) == (
        1,
        1,
        0,
    )


def test_a_step_is_suspicious_from_the_beginning_of_a_sign():
    health, suspicious, spoken = Health(), [], {}
    figures = [*best(5, 5, 6, 5, 1, 5, 0, 0, 5), SOUND | {"kl": 2.0}, SOUND | {"kl": 1.5}, SOUND]
    for number, step in enumerate(figures):
        spoken |= {sign.kind: number for sign in health.judge(step, True, 1.0, ["5."] * 6, ["6."])}
        suspicious.append(health.suspicious)
    assert spoken == {"exploits": 7, "kl": 9}
    assert [number for number, is_so in enumerate(suspicious) if is_so] == [4, 6, 7, 9, 10]
