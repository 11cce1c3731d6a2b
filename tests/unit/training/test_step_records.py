"""What a record says about its stage."""

from tuner.training.step_records import conditions, of_policy, warming_up


def test_a_step_of_ppo_is_known_by_what_it_holds() -> None:
    assert of_policy({"step": 1, "score": 0.5, "kl": 0.0})
    assert of_policy({"step": 1, "score": None, "kl": None}), "a skipped step"
    assert not of_policy({"step": 1, "loss": 2.0})
    assert not of_policy({"step": 1, "loss": 2.0, "score": 0.5})


def test_the_critic_learns_alone_where_the_policy_has_no_loss() -> None:
    assert warming_up({"value_loss": 1.0})
    assert warming_up({"value_loss": 1.0, "policy_loss": None})
    assert not warming_up({"value_loss": 1.0, "policy_loss": 0.0})
    assert not warming_up({"value_loss": None, "policy_loss": None}), "skipped: nothing learned"


def test_conditions_come_in_the_order_of_the_records() -> None:
    records = [
        {"step": 1, "score": 0.0},
        {"score/b": 1.0, "reward/c": 1.0},
        {"score/a/x": None, "score/b": 1.0},
    ]
    assert conditions(records) == ["b", "a/x"]
    assert conditions(records, of="reward") == ["c"]
