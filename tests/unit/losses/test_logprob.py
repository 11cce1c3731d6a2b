"""Log-probabilities by chunk against plain torch: values, entropies and gradients, kept or computed again."""

import math

import pytest
import torch

from tuner.losses import chunked_softmax as chunks
from tuner.losses.logprob import entropies_of_head, logprobs, logprobs_of_head
from tuner.losses.token import cross_entropy

N, D, V = 37, 16, 50


@pytest.fixture
def case():
    torch.manual_seed(0)
    hidden = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    bias = torch.randn(V, requires_grad=True)
    targets, upstream = torch.randint(0, V, (N,)), torch.randn(N)
    return hidden, weight, bias, targets, upstream


def reference(hidden, weight, bias, targets, upstream, temperature=1.0):
    """In fp64: log-probabilities, entropies, and gradients of Σ upstream · logprob."""
    logits = (hidden.double() @ weight.double().T + bias.double()) / temperature
    every = logits.log_softmax(-1)
    own = every.gather(-1, targets[:, None])[:, 0]
    entropies = -(every.exp() * every).sum(-1)
    return own, entropies, torch.autograd.grad(own, (hidden, weight, bias), upstream.double())


def assert_close(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-5, "atol": 2e-6}
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), other.double(), **tolerance)


def count_products(monkeypatch) -> list[int]:
    """Rows of every product of hidden states and head that is computed from here on."""
    rows, product = [], torch.mm

    def counted(left, right, **fields):
        if right.shape == (D, V):
            rows.append(len(left))
        return product(left, right, **fields)

    monkeypatch.setattr(torch, "mm", counted)
    return rows


def test_by_hand():
    """Logits (0, ln 3) are probabilities ¼ and ¾; at temperature ½ (0, ln 9): 1/10 and 9/10."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]])
    own, entropies = logprobs(hidden, weight, torch.tensor([0, 1]), entropy=True)
    assert own.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)], rel=1e-6)
    assert entropies is not None
    by_hand = math.log(4) - 3 / 4 * math.log(3)  # −¼ ln ¼ − ¾ ln ¾
    assert entropies.tolist() == pytest.approx([by_hand, by_hand], rel=1e-6)
    own, entropies = logprobs(hidden, weight, torch.tensor([0, 1]), None, 0.5, True)
    assert own.tolist() == pytest.approx([math.log(1 / 10), math.log(9 / 10)], rel=1e-6)
    by_hand = math.log(10) - 9 / 10 * math.log(9)
    assert entropies.tolist() == pytest.approx([by_hand, by_hand], rel=1e-6)


def test_the_entropy_of_no_preference_is_the_logarithm_of_the_vocabulary():
    _, entropies = logprobs(
        torch.zeros(3, D), torch.randn(V, D), torch.zeros(3, dtype=torch.long), entropy=True
    )
    assert entropies.tolist() == pytest.approx([math.log(V)] * 3, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1000])
def test_equals_plain_log_softmax(case, chunk, temperature, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk * V)
    hidden, weight, bias, targets, upstream = case
    expected, entropies, gradients = reference(*case, temperature)
    own, found = logprobs(hidden, weight, targets, bias, temperature, entropy=True)
    assert own.dtype == found.dtype == torch.float32
    assert not found.requires_grad
    assert_close((own, found), (expected, entropies))
    assert_close(torch.autograd.grad(own, (hidden, weight, bias), upstream), gradients)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_general_head_equals_the_matrix(case, chunk, temperature, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk * V)
    hidden, weight, bias, targets, upstream = case
    expected, entropies, gradients = reference(*case, temperature)
    own, found = logprobs_of_head(
        lambda rows: rows @ weight.T + bias, hidden, targets, V, temperature, entropy=True
    )
    assert not found.requires_grad
    assert_close((own, found), (expected, entropies))
    assert_close(torch.autograd.grad(own, (hidden, weight, bias), upstream), gradients)
    own, found = logprobs_of_head(lambda rows: rows @ weight.T + bias, hidden, targets, V, temperature)
    assert found is None
    assert_close([own], [expected])


def test_each_token_has_a_gradient_of_its_own(case):
    """PPO's weight of a token hangs on its own log-probability."""
    hidden, weight, bias, targets, _ = case
    own, _ = logprobs(hidden, weight, targets, bias)
    found = torch.autograd.grad((own.exp() * own).sum(), (hidden, weight, bias))
    other = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert_close(found, torch.autograd.grad((other.exp() * other).sum(), (hidden, weight, bias)))


def test_one_chunk_is_kept_and_several_are_computed_again(case, monkeypatch):
    hidden, weight, bias, targets, upstream = case
    rows = count_products(monkeypatch)

    def passes(head_is_trained: bool, chunk: int) -> list[int]:
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk * V)
        rows.clear()
        head = weight if head_is_trained else weight.detach()
        own, _ = logprobs(hidden, head, targets, bias.detach())
        own.backward(upstream)
        return list(rows)

    assert passes(head_is_trained=True, chunk=37) == [37]
    assert passes(head_is_trained=True, chunk=20) == [20, 17, 20, 17]
    assert passes(head_is_trained=False, chunk=20) == [20, 17]  # hidden states need none of it again


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("names", ["hidden", "weight", "bias", "hidden bias", "hidden weight"])
def test_any_part_may_be_frozen(case, names, chunk, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk * V)
    parts = dict(zip(("hidden", "weight", "bias"), case[:3], strict=True))
    targets, upstream = case[3:]
    expected = dict(zip(parts, reference(*case)[2], strict=True))
    used = {name: part if name in names else part.detach() for name, part in parts.items()}
    own, _ = logprobs(used["hidden"], used["weight"], targets, used["bias"])
    own.backward(upstream)
    for name, part in used.items():
        if name in names:
            assert_close([part.grad], [expected[name]])
        else:
            assert part.grad is None


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bf16_stays_close_to_fp32(case, chunk, temperature, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk * V)
    hidden, weight, bias, targets, upstream = case
    expected, entropies, gradients = reference(*case, temperature)
    low = hidden.detach().bfloat16().requires_grad_()
    own, found = logprobs(low, weight, targets, bias, temperature, entropy=True)
    own.backward(upstream)
    assert own.dtype == found.dtype == torch.float32
    assert (own - expected).norm() / expected.norm() < 1e-2
    assert (found - entropies).norm() / entropies.norm() < 2e-2
    for part, exact in zip((low, weight, bias), gradients, strict=True):
        assert (part.grad - exact).norm() / exact.norm() < 2e-2
    assert low.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


def test_under_autocast_products_are_in_its_dtype(case):
    """As a linear layer's are; gradients of fp32 leaves stay fp32."""
    hidden, weight, bias, targets, upstream = case
    with torch.autocast("cpu", torch.bfloat16):
        own, entropies = logprobs(hidden, weight, targets, bias, 0.7, True)
    low, low_entropies = logprobs(hidden.bfloat16(), weight, targets, bias, 0.7, True)
    assert torch.equal(own, low)
    assert torch.equal(entropies, low_entropies)
    assert not torch.equal(own, logprobs(hidden, weight, targets, bias, 0.7)[0])
    own.backward(upstream)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_the_loss_of_language_modelling_is_their_weighted_sum(case):
    hidden, weight, bias, targets, weights = case
    for low in (hidden, hidden.bfloat16()):
        own, _ = logprobs(low, weight, targets, bias)
        loss = cross_entropy(low, weight, targets, weights, bias)
        assert loss.item() == pytest.approx(-(own * weights).sum().item(), rel=1e-5)


def test_without_gradients_none_are_prepared(case, monkeypatch):
    hidden, weight, bias, targets, _ = case
    expected, entropies, _ = reference(*case)
    with torch.no_grad():
        products = []
        product = torch.mm
        monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a) or product(*a, **k))
        own, found = logprobs(hidden, weight, targets, bias, entropy=True)
    assert len(products) == 1
    assert not own.requires_grad
    assert_close((own, found), (expected, entropies))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 7, 36, 1000])
def test_the_gradient_of_entropies(case, chunk, temperature, monkeypatch):
    """By the logits z it is −p (log p + H) / T: by autograd in fp64, and by that formula."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk * V)
    hidden, weight, bias, _, upstream = case
    own = entropies_of_head(lambda rows: rows @ weight.T + bias, hidden, V, temperature)
    logits = ((hidden.double() @ weight.double().T + bias.double()) / temperature).detach().requires_grad_()
    every = logits.log_softmax(-1)
    entropies = -(every.exp() * every).sum(-1)
    (by_logits,) = torch.autograd.grad(entropies, logits, upstream.double())
    formula = -every.exp() * (every + entropies[:, None]) * upstream[:, None]
    assert_close([by_logits], [formula.detach()])
    expected = (by_logits @ weight.double(), by_logits.T @ hidden.double(), by_logits.sum(0))
    gradients = torch.autograd.grad(own, (hidden, weight, bias), upstream)
    assert_close(
        (own, *gradients), (entropies, *(part / temperature for part in expected)), rtol=1e-4, atol=1e-5
    )


def test_entropies_only_where_they_are_asked_for(case):
    hidden, weight, bias, targets, _ = case
    assert logprobs(hidden, weight, targets, bias)[1] is None


@pytest.mark.parametrize("size", [30.0, 200.0, 3000.0])
def test_certain_and_impossible_tokens(size):
    """Logits (size, 0): the second token's log-probability is −size, where its probability is 0 in fp32."""
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[size], [0.0]], requires_grad=True)
    own, entropies = logprobs(hidden, weight, torch.tensor([0, 1]), entropy=True)
    assert own.tolist() == pytest.approx([0, -size], abs=1e-6)
    assert entropies.tolist() == pytest.approx([0, 0], abs=1e-10)
    own.backward(torch.tensor([1.0, 1.0]))
    # d log p₁ = (1 − p₁, −p₂) = 0 by the logits; d log p₂ = (−p₁, 1 − p₂) = (−1, 1)
    assert hidden.grad[:, 0].tolist() == pytest.approx([0, -size], abs=1e-9)
    assert weight.grad[:, 0].tolist() == pytest.approx([-1, 1], abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 50.0, -50.0])
def test_logits_far_from_zero_lose_no_more_than_their_own_digits(shift):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.full((V,), shift)
    targets = torch.randint(0, V, (N,))
    own, _ = logprobs(hidden, weight, targets, bias)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(own.double(), exact, rtol=0, atol=2e-5)


def test_no_tokens_are_nothing_with_zero_gradients(case):
    hidden, weight, bias, targets, _ = case
    for own, entropies in (
        logprobs(hidden[:0], weight, targets[:0], bias, entropy=True),
        logprobs_of_head(lambda rows: rows @ weight.T + bias, hidden[:0], targets[:0], V, entropy=True),
    ):
        assert own.shape == entropies.shape == (0,)
        weight.grad = bias.grad = None
        own.sum().backward()
        assert weight.grad.abs().max() == bias.grad.abs().max() == 0


def test_a_second_backward_pass_is_the_same_or_refused(case):
    hidden, weight, bias, targets, upstream = case
    own, _ = logprobs(hidden, weight, targets, bias)
    first = torch.autograd.grad(own, (hidden, weight, bias), upstream, retain_graph=True)
    assert_close(torch.autograd.grad(own, (hidden, weight, bias), upstream), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(own, (hidden, weight, bias), upstream)
