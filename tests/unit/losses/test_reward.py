"""The losses of a reward model by hand, and where they push."""

import math

import pytest
import torch

from tuner.losses.reward import log_barrier, ranking_loss, square_penalty

ONE = torch.ones(1)
BY_HAND = {0.3: 1.203973, 0.5: 0.693147, 0.6: 0.326928, 0.75: 0.071921, 0.9: 0.004214, 0.99: 0.000004}
"""P -> −(1 − 2 max(0, P − ½))² log P."""


def lead_of(probability: float) -> torch.Tensor:
    return torch.tensor([math.log(probability / (1 - probability))])


def slope(function, at: float, dtype=torch.float32, **fields) -> float:
    """Derivative of a sum over one value of weight 1."""
    value = torch.tensor([at], dtype=dtype, requires_grad=True)
    function(value, ONE, **fields).backward()
    assert value.grad is not None
    assert value.grad.isfinite().all()
    return value.grad.item()


@pytest.mark.parametrize("probability", BY_HAND)
def test_focal_ranking_by_hand(probability):
    loss = ranking_loss(lead_of(probability), ONE, gamma=2.0)
    assert loss.item() == pytest.approx(BY_HAND[probability], abs=5e-7)


def test_without_focus_it_is_bradley_terry():
    leads = torch.linspace(-12, 12, 49)
    expected = -torch.log(1 / (1 + torch.exp(-leads.double())))
    assert ranking_loss(leads, torch.ones(49)).item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert ranking_loss(leads[:1], ONE, gamma=0.0).item() == pytest.approx(expected[0].item(), rel=1e-6)


def test_pairs_that_are_wrong_cost_the_same_with_any_focus():
    leads = torch.tensor([-9.0, -0.5, -1e-3])
    plain = ranking_loss(leads, torch.ones(3))
    for gamma in (0.5, 1.0, 2.0, 5.0):
        torch.testing.assert_close(ranking_loss(leads, torch.ones(3), gamma), plain, rtol=1e-5, atol=0)


def test_losses_are_sums_by_weight_and_add_up():
    values, weights = torch.randn(64, generator=torch.Generator().manual_seed(0)), torch.rand(64)
    for loss in (lambda v, w: ranking_loss(v, w, 2.0), log_barrier, square_penalty):
        whole = loss(values, weights)
        torch.testing.assert_close(loss(values[:20], weights[:20]) + loss(values[20:], weights[20:]), whole)
        torch.testing.assert_close(loss(values, 3 * weights), 3 * whole)
        assert loss(values, torch.zeros(64)).item() == 0
        assert loss(values[:0], weights[:0]).item() == 0


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("lead", [-1e4, -200.0, -3.0, 0.5, 3.0, 20.0, 88.0, 110.0, 200.0, 1e4])
def test_gradients_of_extreme_leads_are_finite_and_never_push_the_wrong_way(lead, gamma):
    found = slope(ranking_loss, lead, gamma=gamma)
    assert found <= 0
    if lead < 0:
        assert found == pytest.approx(-1 / (1 + math.exp(max(lead, -700))), rel=1e-4)
    if lead >= 20:
        assert found == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("lead", [0.1, 0.7, 2.0, 5.0])
def test_the_focal_gradient_is_the_formulas(lead):
    x = torch.tensor([lead], dtype=torch.float64, requires_grad=True)
    probability = torch.sigmoid(x)
    (-((1 - 2 * (probability - 0.5)) ** 2) * probability.log()).sum().backward()
    assert x.grad is not None
    assert slope(ranking_loss, lead, gamma=2.0) == pytest.approx(x.grad.item(), rel=1e-5)


def test_the_barrier_by_hand():
    assert log_barrier(torch.zeros(1), ONE).item() == pytest.approx(-3.218876, abs=1e-6)
    for edge in (-4.999, 4.999):  # where fp32 knows the distance to the pole to 1e-4 of it
        assert log_barrier(torch.tensor([edge]), ONE).item() == pytest.approx(4.605270, abs=1e-3)
    assert log_barrier(torch.tensor([3.0]), ONE).item() == pytest.approx(-math.log(8) - math.log(2), abs=1e-6)
    assert log_barrier(torch.zeros(1), ONE, bound=1.0).item() == 0


def test_a_head_of_zeros_costs_what_the_paper_says():
    total = ranking_loss(torch.zeros(1), ONE, 2.0) + 0.02 * log_barrier(torch.zeros(2), torch.full((2,), 0.5))
    assert total.item() == pytest.approx(0.628770, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_barrier_pushes_inwards_the_harder_the_farther_out(sign, dtype):
    slopes = [sign * slope(log_barrier, sign * size, dtype) for size in (0.5, 4.9, 5.0, 6.0, 50.0)]
    assert slopes == sorted(slopes)
    assert slopes[0] > 0
    assert slopes[0] == pytest.approx(0.5 * 2 / (25 - 0.25), rel=1e-2)
    if dtype is torch.float32:
        assert slopes[1] == pytest.approx(1 / 0.1 - 1 / 9.9, rel=1e-4)
    assert slopes[2] > 1000
    assert slopes[4] > 40 * slopes[3] / 2
    values = [
        log_barrier(torch.tensor([sign * size], dtype=dtype), ONE).item() for size in (4.9, 5.0, 6.0, 50.0)
    ]
    assert values == sorted(values)
    assert all(map(math.isfinite, values))


def test_the_barrier_is_smooth_where_the_parabola_begins():
    inside, outside = 4.9989, 4.9991
    values = [log_barrier(torch.tensor([x]), ONE).item() for x in (inside, outside)]
    slopes = [slope(log_barrier, x) for x in (inside, outside)]
    assert values[1] - values[0] == pytest.approx(2e-4 * sum(slopes) / 2, rel=0.02)
    assert slopes == pytest.approx([1 / 0.0011, 1 / 0.001 + 1e6 * 1e-4], rel=0.01)


def test_square_penalty_by_hand():
    assert square_penalty(torch.tensor([3.0, -2.0]), torch.tensor([0.5, 1.0])).item() == 8.5
    assert slope(square_penalty, -50.0) == -100


@pytest.mark.parametrize("loss", [lambda v, w: ranking_loss(v, w, 2.0), log_barrier, square_penalty])
def test_bf16_values_are_summed_in_fp32(loss):
    values = torch.linspace(-4, 4, 1001).bfloat16()
    found = loss(values, torch.ones(1001))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss(values.float(), torch.ones(1001)).item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(values, torch.ones(1001)).item() == found.item()
