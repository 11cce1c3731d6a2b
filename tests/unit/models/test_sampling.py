"""The next token: nuclei by hand, frequencies equal to the probabilities, and numbers that belong to a row alone."""

import numpy as np
import pytest
import torch

from tuner.models import sampling
from tuner.models.sampling import Forbidden, choose, nucleus, uniforms

HAND = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def forbid(*ids):
    return Forbidden(torch.tensor(ids), torch.tensor([True]))


def picked(probabilities, top_p, uniform, temperature=1.0, **limits):
    tokens_B, logprobs_B = choose(
        probabilities.log(), temperature, top_p, torch.tensor([uniform], dtype=torch.float64), **limits
    )
    return int(tokens_B), float(logprobs_B)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, [1]),  # the likeliest is always kept
        (0.4 - 1e-6, [1]),
        (0.5, [1, 3]),  # 0.4 stands before the second, 0.7 before the third
        (0.7 - 1e-6, [1, 3]),
        (0.75, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
    ],
)
def test_nucleus_by_hand(top_p, expected):
    assert nucleus(HAND, top_p)[0].nonzero()[:, 0].tolist() == expected


def test_equals_are_kept_in_vocabulary_order():
    equal = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2]])
    assert nucleus(equal, 0.5)[0].tolist() == [True, True, True, False, False]
    above = torch.tensor([[0.125, 0.125, 0.5, 0.125, 0.125]])
    assert nucleus(above, 0.7)[0].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_a_stable_sort(top_p, monkeypatch):
    """Also where it is wider than the likeliest tokens it is first looked for in, and with many ties."""
    monkeypatch.setattr(sampling, "MOST_LIKELY", (3, 9))
    logits_BV = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    for probabilities_BV in (logits_BV.softmax(-1), (2 * logits_BV).round().softmax(-1)):
        for row_V in probabilities_BV:
            sorted_V, order_V = row_V.double().sort(descending=True, stable=True)
            expected_V = torch.zeros(64, dtype=torch.bool)
            expected_V[order_V] = sorted_V.cumsum(0) - sorted_V < top_p
            assert torch.equal(nucleus(row_V[None], top_p)[0], expected_V)
        assert torch.equal(
            nucleus(probabilities_BV, top_p),
            torch.cat([nucleus(row[None], top_p) for row in probabilities_BV]),
        )


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.4999, 1), (0.5001, 2), (0.7001, 3), (1 - 2**-53, 3)],
)
def test_tokens_stand_in_vocabulary_order(uniform, token):
    assert picked(HAND, 1.0, uniform)[0] == token


def test_a_nucleus_is_drawn_from_as_a_whole():
    """Of 0.4 and 0.3 the second begins at 4/7."""
    assert picked(HAND, 0.5, 0.0)[0] == 1
    assert picked(HAND, 0.5, 4 / 7 - 1e-6)[0] == 1
    assert picked(HAND, 0.5, 4 / 7 + 1e-6)[0] == 3


def test_logprobs_are_without_the_nucleus_and_at_the_temperature():
    token, logprob = picked(HAND, 0.5, 0.9)
    assert (token, logprob) == (3, pytest.approx(np.log(0.3), abs=1e-6))
    token, logprob = picked(HAND, 1.0, 0.99, temperature=2.0)
    roots = np.sqrt([0.1, 0.4, 0.2, 0.3])
    assert (token, logprob) == (3, pytest.approx(np.log(roots[3] / roots.sum()), abs=1e-6))


@pytest.mark.parametrize(
    ("uniform", "limits", "token"),
    [
        (0.999, {"top_k": 1}, 1),
        (4 / 7 - 1e-6, {"top_k": 2}, 1),  # of 0.4 and 0.3
        (4 / 7 + 1e-6, {"top_k": 2}, 3),
        (0.999, {"top_k": 9}, 3),
        (0.999, {"top_k": 2, "top_p": 0.57}, 1),  # of 4/7 and 3/7 the first alone reaches 0.57
        (0.999, {"top_k": 2, "top_p": 0.58}, 3),
        (0.999, {"forbidden": forbid(3)}, 2),
        (0.999, {"forbidden": forbid(3, 1), "top_k": 1}, 2),
        (0.5, {"forbidden": forbid(0, 1, 3, 99)}, 2),
    ],
)
def test_candidates_by_hand(uniform, limits, token):
    top_p = {"top_p": 1.0} | limits
    chosen, logprob = picked(HAND, uniform=uniform, **top_p)
    assert chosen == token
    assert logprob == pytest.approx(float(HAND[0, token].log()), abs=1e-6), "over the whole vocabulary"


def test_of_equals_the_first_are_among_the_top_k():
    logits_BV = torch.tensor([[1.0, 0.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    allowed = set()
    for uniform in (0.0, 0.3, 0.6, 0.999):
        uniform_B = torch.full((2,), uniform, dtype=torch.float64)
        allowed |= set(enumerate(choose(logits_BV, 1.0, 1.0, uniform_B, top_k=3)[0].tolist()))
    assert allowed == {(0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)}


def test_a_certain_token_that_is_forbidden_leaves_the_others_their_odds():
    logits_BV = torch.tensor([[1000.0, 1.0, 1.0, 0.0]])
    tokens = [
        int(
            choose(
                logits_BV,
                1.0,
                0.9,
                torch.tensor([u], dtype=torch.float64),
                forbidden=forbid(0),
            )[0]
        )
        for u in (0.4, 0.8, 0.99)
    ]
    # e : e : 1 of 2e + 1: nothing is left of the nucleus at 0.84, so that the third is in it
    assert tokens == [1, 2, 3]
    assert int(choose(logits_BV, 0.0, forbidden=forbid(0))[0]) == 1


def test_what_one_row_may_not_have_another_may():
    logits_BV = torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    tokens_B, _ = choose(logits_BV, 0.0, forbidden=Forbidden(torch.tensor([0]), torch.tensor([True, False])))
    assert tokens_B.tolist() == [1, 0]


def test_greedy_takes_the_likeliest_and_its_logprob_at_temperature_one():
    tokens_B, logprobs_B = choose(HAND.log(), 0.0)
    assert int(tokens_B) == 1
    assert float(logprobs_B) == pytest.approx(np.log(0.4), abs=1e-6)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_frequencies_are_the_probabilities(top_p):
    count = 40_000
    exact = np.array([0.1, 0.4, 0.2, 0.3]) * ([1, 1, 1, 1] if top_p == 1 else [0, 1, 1, 1])
    exact /= exact.sum()
    uniform_B = torch.from_numpy(uniforms(0, 0, [0], count)[0])
    tokens_B, _ = choose(HAND.log().expand(count, -1), 1.0, top_p, uniform_B)
    frequencies = np.bincount(tokens_B.numpy(), minlength=4) / count
    assert np.all(frequencies[exact == 0] == 0)
    assert np.abs(frequencies - exact).max() < 4 * np.sqrt(0.25 / count)


def test_uniforms_belong_to_seed_step_and_place():
    both = uniforms(3, 5, [7, 2], 4)
    assert both.dtype == np.float64
    assert both.tolist() == [uniforms(3, 5, [place], 4)[0].tolist() for place in (7, 2)]
    assert both[0].tolist() == np.random.default_rng((3, 5, 7)).random(4).tolist()
    assert uniforms(3, 5, [7], 6)[0, :4].tolist() == both[0].tolist()
    assert len({float(uniforms(*where, 1)[0, 0]) for where in ((0, 0, [1]), (0, 1, [0]), (1, 0, [0]))}) == 3
    assert uniforms(0, 0, [], 4).shape == (0, 4)


def test_logits_that_are_no_numbers_are_told_by_the_logprob():
    bad = torch.full((1, 4), float("nan"))
    tokens_B, logprobs_B = choose(bad, 1.0, 1.0, torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= int(tokens_B) < 4
    assert torch.isnan(logprobs_B).all()


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_no_sum_depends_on_the_order_of_its_terms(top_p, monkeypatch):
    """Devices add floating-point numbers in orders of their own; CUDA has no deterministic cumulative sum of them."""
    cumsum = torch.Tensor.cumsum

    def checked(tensor, *arguments, **settings):
        assert not tensor.is_floating_point()
        return cumsum(tensor, *arguments, **settings)

    monkeypatch.setattr(torch.Tensor, "cumsum", checked)
    monkeypatch.setattr(torch.Tensor, "cumsum_", lambda tensor, dim: tensor.copy_(checked(tensor, dim=dim)))
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 3
    largest = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens_B, _ = choose(logits, 1.0, top_p, largest)
    assert tokens_B[0] == nucleus(logits.softmax(-1), top_p)[0].nonzero()[0]
    assert tokens_B[2] == nucleus(logits.softmax(-1), top_p)[2].nonzero()[-1]
