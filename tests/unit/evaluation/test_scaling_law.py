"""The law of Gao et al. fitted to points that were drawn from it, and what it refuses to predict."""

import math

import numpy as np
import pytest

from tuner.evaluation.over_optimization.scaling_law import Point, distance, fit_law, t_quantile


def drawn(
    alpha: float,
    beta: float,
    reach: float,
    noise: float = 0.0,
    seed: int = 0,
    rounds: tuple[int, ...] = (1,),
    count: int = 40,
) -> list[Point]:
    """Points of the law, evenly spaced up to a distance, with normal noise; the gold score at distance 0 is 0.2."""
    draw, points = np.random.default_rng(seed), []
    for number in rounds:
        for step, d in enumerate(np.linspace(0, reach * number, count)):
            bend = math.log(d / number) if d else 0.0
            gold = 0.2 + d * (alpha - beta * bend) + draw.normal(0, noise)
            points.append(Point(step, float(d), gold, score=d, round=number))
    return points


def test_exact_points_give_their_parameters_back():
    law = fit_law(drawn(0.5, 0.3, reach=4.0))
    assert law is not None
    assert (law.start.value, law.alpha.value, law.beta.value) == pytest.approx((0.2, 0.5, 0.3))
    assert law.turning_point is not None
    assert law.turning_point.value == pytest.approx(math.exp(0.5 / 0.3 - 1))
    assert (law.turning_point.low, law.turning_point.high) == pytest.approx((law.turning_point.value,) * 2)
    assert law.gold(2.0) == pytest.approx(0.2 + 2 * (0.5 - 0.3 * math.log(2)))
    assert law.gold(0.0) == pytest.approx(0.2)


def test_in_round_k_it_turns_at_k_times_the_distance():
    law = fit_law(drawn(0.5, 0.3, reach=3.0, rounds=(1, 2, 3)))
    assert law is not None
    assert (law.alpha.value, law.beta.value) == pytest.approx((0.5, 0.3))
    turn = law.turning_point_of(3)
    assert turn is not None
    assert turn.value == pytest.approx(3 * math.exp(0.5 / 0.3 - 1))
    golds = [law.gold(d, 3) for d in (turn.value - 0.1, turn.value, turn.value + 0.1)]
    assert golds[1] == max(golds)


def test_the_interval_of_the_turning_point_covers_it():
    """95% of 400 fits, within three standard errors of that share."""
    covered = 0
    for seed in range(400):
        law = fit_law(drawn(0.5, 0.3, reach=4.0, noise=0.05, seed=seed))
        assert law is not None
        assert law.turning_point is not None
        covered += law.turning_point.low <= math.exp(0.5 / 0.3 - 1) <= law.turning_point.high
    assert abs(covered / 400 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (drawn(0.5, -0.1, reach=4.0), "beta is not above 0"),
        (drawn(0.5, 0.1, reach=4.0, noise=0.3, seed=1), "cannot be told from noise"),
        (drawn(0.5, 0.15, reach=1.0, noise=1e-4), "the data do not reach far enough"),
    ],
)
def test_what_the_data_do_not_show_is_not_predicted(points: list[Point], reason: str):
    law = fit_law(points)
    assert law is not None
    assert law.turning_point is law.turning_point_of(2) is None
    assert reason in law.no_turning_point


def test_too_few_points_or_one_distance_have_no_law():
    assert fit_law(drawn(0.5, 0.3, reach=4.0, count=7)) is None
    assert fit_law(drawn(0.5, 0.3, reach=0.0)) is None
    assert fit_law([]) is None


def test_a_kl_below_zero_is_no_distance():
    assert (distance(-0.01), distance(4.0)) == (0.0, 2.0)


@pytest.mark.parametrize(("freedom", "quantile"), [(5, 2.5706), (10, 2.2281), (21, 2.0796), (1000, 1.9623)])
def test_quantiles_of_student_s_t(freedom: int, quantile: float):
    """From a table."""
    assert t_quantile(freedom) == pytest.approx(quantile, abs=3e-3)
