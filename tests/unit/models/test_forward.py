"""Losses, log-probabilities and values of packed rows by the logits and states written out, for every kind of head."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.bounds import model_rounding
from tests.whole_models import full_logits
from tuner.config import LoRA, Model
from tuner.data.batch import make_batch
from tuner.models.forward import hidden_states, scores, token_logprobs, token_loss, values
from tuner.models.load import load_model
from tuner.models.unwrap import unwrapped

CPU = torch.device("cpu")


def row():
    generator = np.random.default_rng(0)
    return make_batch(
        [
            (generator.integers(10, 500, n).astype(np.int32), np.linspace(0, 1, n, dtype=np.float32))
            for n in (9, 14)
        ]
    )


def written_out(model, batch):
    with torch.no_grad():
        logprobs = full_logits(model, batch).log_softmax(-1)
    targets = batch.tokens_T[batch.learned_N]
    return -(logprobs[batch.learned_N - 1].gather(-1, targets[:, None])[:, 0] * batch.weights_N).sum()


@pytest.mark.parametrize(
    "adapter",
    [
        None,
        LoRA(r=4),
        LoRA(r=4, train_whole=("lm_head", "embed_tokens")),
        LoRA(r=4, targets=("q_proj", "lm_head")),
    ],
    ids=["full", "lora", "head-trained-whole", "adapted-head"],
)
def test_loss_by_the_logits(adapter):
    model = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU, adapter=adapter).model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss = token_loss(model, row())
    assert loss.item() == pytest.approx(written_out(model, row()).item(), rel=1e-5)
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained)


def test_a_soft_cap_on_the_logits_counts():
    model = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU).model
    plain = token_loss(model, row()).item()
    unwrapped(model).config.final_logit_softcapping = 1.0
    assert token_loss(model, row()).item() == pytest.approx(written_out(model, row()).item(), rel=1e-5)
    assert token_loss(model, row()).item() != pytest.approx(plain, rel=1e-2)


def by_the_logits(model, batch, temperature=1.0):
    """Log-probabilities and entropies, from logits written out."""
    with torch.no_grad():
        every = (full_logits(model, batch) / temperature).log_softmax(-1)[batch.learned_N - 1]
    ours = every.gather(-1, batch.tokens_T[batch.learned_N][:, None])[:, 0]
    return ours, -(every.exp() * every).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "adapter", [None, LoRA(r=4, targets=("q_proj", "lm_head"))], ids=["matrix", "adapted"]
)
def test_logprobs_by_the_logits(adapter, temperature):
    model = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU, adapter=adapter).model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ours, entropies = token_logprobs(model, row(), temperature, entropy=True)
    expected, expected_entropies = by_the_logits(model, row(), temperature)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # and where nothing is learned, by the kernel of the log-probabilities
        measured = token_logprobs(model, row(), temperature, entropy=True)[1]
    torch.testing.assert_close(measured, expected_entropies, rtol=1e-5, atol=1e-5)
    (ours + entropies).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained)
    with torch.no_grad():
        again, none = token_logprobs(model, row(), temperature)
    torch.testing.assert_close(again, ours.detach(), rtol=0, atol=0)
    assert none is None


def test_logprobs_know_of_a_soft_cap():
    model = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU).model
    plain, _ = token_logprobs(model, row())
    unwrapped(model).config.final_logit_softcapping = 1.0
    ours, entropies = token_logprobs(model, row(), 0.6, entropy=True)
    for actual, expected in zip((ours, entropies), by_the_logits(model, row(), 0.6), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, plain, rtol=0.1)


def test_logprobs_and_the_loss_have_the_same_gradients():
    """Summed by weight, they are the loss of language modelling, and teach the same.

    Their gradients part at the head, and carry a rounding each through all layers down: on four ways to sum (vectors
    of 512, 256 and 128 bits, MKL's compatible mode) they lay 1.1e-5 to 2.0e-5 of the norm apart, and each up to 5e-5
    from fp64; the arithmetic allows 1.0e-4 of one. A weight off by a thousandth is seen.
    """
    model = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU, adapter=LoRA(r=4)).model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = token_loss(model, row())
    expected = torch.autograd.grad(loss, trained)
    ours = -(token_logprobs(model, row())[0] * row().weights_N).sum()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    near = model_rounding(unwrapped(model).config, torch.float32, backward=True)
    for actual, other in zip(torch.autograd.grad(ours, trained), expected, strict=True):
        assert (actual - other).norm() <= near * other.norm()


def critic():
    model = load_model(
        Model(path="tuner:tiny"), precision="fp32", device=CPU, adapter=LoRA(r=4), head="score"
    ).model
    torch.nn.init.normal_(next(p for n, p in model.named_parameters() if "score" in n and p.requires_grad))
    return model


def test_values_are_read_before_each_learned_token():
    model, batch = critic(), row()
    actual = values(model, batch)
    with torch.no_grad():
        every = unwrapped(model).score(hidden_states(model, batch))[:, 0]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, every[batch.learned_N - 1], rtol=1e-5, atol=1e-5)
    actual.sum().backward()
    trained = [
        parameter for name, parameter in model.named_parameters() if "score" in name or "lora_B" in name
    ]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained if p.requires_grad)


def test_a_value_and_a_score_of_the_same_place_are_the_same_number():
    """The score is read at a segment's last token: the value before the token that would come next."""
    model, tokens = critic(), np.arange(20, 30, dtype=np.int32)
    only_last = np.zeros(10, dtype=np.float32)
    only_last[-1] = 1
    shorter = make_batch([(tokens[:-1], np.zeros(9, dtype=np.float32))])
    with torch.no_grad():
        value, score = values(model, make_batch([(tokens, only_last)])), scores(model, shorter)
    torch.testing.assert_close(value, score, rtol=1e-5, atol=1e-6)


def test_logprobs_and_values_hang_on_nothing_else_in_the_row():
    model, batch = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU).model, row()
    judge = critic()
    weights = torch.zeros(len(batch.tokens_T))
    weights[batch.learned_N] = batch.weights_N
    alone = [
        make_batch([(batch.tokens_T[start:end].int().numpy(), weights[start:end].numpy().copy())])
        for start, end in pairwise(batch.borders)
    ]
    with torch.no_grad():
        for read in (
            lambda segment: token_logprobs(model, segment)[0],
            lambda segment: values(judge, segment),
        ):
            torch.testing.assert_close(
                torch.cat([read(segment) for segment in alone]), read(batch), rtol=1e-4, atol=1e-5
            )


def test_under_autocast_values_keep_their_digits():
    """The backbone computes in bf16, the head in fp32."""
    model, batch = critic(), row()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = values(model, batch)
        states = hidden_states(model, batch)[batch.learned_N - 1]
    expected = unwrapped(model).score(states.float())[:, 0]
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, actual.bfloat16().float())
