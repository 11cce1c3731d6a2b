"""What is said of a policy, by figures made up here."""

import json

from tuner.rollout.health import Health

SOUND = {"kl": 0.01, "kl_k3": 0.01, "ended": 0.9}


def judged(steps: list[dict[str, float]], grad_norms: list[float] | None = None) -> list[tuple[int, str]]:
    """(step, sentence) of all that is said; the state goes through JSON at every step, as in a killed run."""
    state, said = {}, []
    for number, figures in enumerate(steps):
        health = Health.of(json.loads(json.dumps(state)))
        norm = 1.0 if grad_norms is None else grad_norms[number]
        said += [(number, sentence) for sentence in health.judge(figures, trained=True, grad_norm=norm)]
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
