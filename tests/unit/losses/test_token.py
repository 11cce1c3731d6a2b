"""The chunked loss against plain torch: value and gradients, for every way of splitting."""

import pytest
import torch
from torch.nn.functional import cross_entropy as plain

from tuner.losses import chunked_softmax as module
from tuner.losses.token import cross_entropy, cross_entropy_of_head

N, D, V = 37, 16, 50


@pytest.fixture
def case():
    torch.manual_seed(0)
    hidden = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    bias = torch.randn(V, requires_grad=True)
    targets, weights = torch.randint(0, V, (N,)), torch.rand(N) * 2
    return hidden, weight, bias, targets, weights


def reference(hidden, weight, bias, targets, weights):
    loss = (
        plain(hidden.double() @ weight.double().T + bias.double(), targets, reduction="none") * weights
    ).sum()
    return loss, torch.autograd.grad(loss / 3, (hidden, weight, bias))


@pytest.mark.parametrize("chunk", [1, 7, 37, 1000])
def test_equals_plain_cross_entropy(case, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk * V)
    hidden, weight, bias, targets, weights = case
    expected, gradients = reference(*case)
    loss = cross_entropy(hidden, weight, targets, weights, bias)
    found = torch.autograd.grad(loss / 3, (hidden, weight, bias))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for own, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_the_general_head_equals_the_matrix(case, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 7 * V)
    hidden, weight, bias, targets, weights = case
    expected, gradients = reference(*case)
    loss = cross_entropy_of_head(lambda rows: rows @ weight.T + bias, hidden, targets, weights, V)
    found = torch.autograd.grad(loss / 3, (hidden, weight, bias))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for own, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_bf16_stays_close_to_fp32(case):
    hidden, weight, bias, targets, weights = case
    expected, gradients = reference(*case)
    low = hidden.detach().bfloat16().requires_grad_()
    loss = cross_entropy(low, weight, targets, weights, bias)
    (loss / 3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert (low.grad - gradients[0]).norm() / gradients[0].norm() < 1e-2
    assert (weight.grad - gradients[1]).norm() / gradients[1].norm() < 1e-2


def test_no_learned_tokens_is_zero_with_zero_gradients(case):
    hidden, weight, bias, targets, weights = case
    loss = cross_entropy(hidden[:0], weight, targets[:0], weights[:0], bias)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.abs().max() == 0


def test_a_frozen_head_gets_no_gradient(case):
    hidden, weight, bias, targets, weights = case
    cross_entropy(hidden, weight.detach(), targets, weights, bias.detach()).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_second_backward_pass_is_refused(case):
    hidden, weight, bias, targets, weights = case
    loss = cross_entropy(hidden, weight, targets, weights, bias)
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()


def test_under_autocast_products_are_in_its_dtype(case):
    """As a linear layer's are; gradients of fp32 leaves stay fp32."""
    hidden, weight, bias, targets, weights = case
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(hidden, weight, targets, weights, bias)
    low = cross_entropy(hidden.bfloat16(), weight, targets, weights, bias)
    assert loss.item() == low.item()
    assert loss.item() != cross_entropy(hidden, weight, targets, weights, bias).item()
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
