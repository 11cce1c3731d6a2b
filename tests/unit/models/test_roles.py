"""Roles: one open at a time, over its backward pass."""

import numpy as np
import pytest
import torch

from tuner.config import LoRA, Model
from tuner.data.batch import make_batch
from tuner.models.adapters import ADAPTER, activate, copy_adapter, train_only
from tuner.models.forward import token_logprobs, values
from tuner.models.load import load_model
from tuner.models.roles import Role, Roles, ScalarHead


@pytest.fixture(scope="module")
def roles():
    loaded = load_model(
        Model(path="tuner:tiny"), precision="fp32", device=torch.device("cpu"), adapter=LoRA(r=2, dropout=0.5)
    )
    return Roles.of("policy", loaded, lambda: torch.autocast("cpu", enabled=False))


def test_another_role_inside_an_open_one_raises(roles):
    with (
        roles.role("policy"),
        pytest.raises(RuntimeError, match="role 'policy' is still open"),
        roles.role("policy"),
    ):
        pass
    with roles.role("policy"):  # and the guard lets go
        pass


def test_an_unknown_role_is_named(roles):
    with pytest.raises(ValueError, match="no role 'critic'"), roles.role("critic"):
        pass


def test_a_role_sets_mode_and_gradients(roles):
    with roles.role("policy", train=True) as model:
        assert model.training
        assert torch.is_grad_enabled()
    with roles.role("policy") as model:
        assert not model.training
        assert not torch.is_grad_enabled()


def test_only_the_adapter_is_trained_in_a_fixed_order(roles):
    names = list(roles.trained())
    assert names
    assert all("lora_" in name for name in names)
    assert names == list(roles.trained())


# Several on one base


@pytest.fixture(scope="module")
def batch():
    return make_batch([(np.arange(20, 44, dtype=np.int32), np.ones(24, np.float32))])


@pytest.fixture
def pair():
    """A policy, and a critic beside it whose adapter is another."""
    cpu = torch.device("cpu")
    loaded = load_model(Model(path="tuner:tiny"), precision="fp32", device=cpu, adapter=LoRA(r=2))
    copy_adapter(loaded.model, ADAPTER, "critic")
    train_only(loaded.model, ADAPTER, "critic")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "critic" in name:
                weight.add_(torch.randn(weight.shape, generator=draw) * 0.1)
    head = ScalarHead(torch.ones(1, loaded.transformer.config.hidden_size), trained=True)
    roles = {"policy": Role(loaded), "critic": Role(loaded, "critic", head), "base": Role(loaded, None)}
    return Roles(roles, lambda: torch.autocast("cpu", enabled=False))


def logprobs(roles, name, batch):
    with roles.role(name) as model:
        return token_logprobs(unheaded(model), batch)[0]


def unheaded(model):
    return model.model if hasattr(model, "score") else model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_switched_before_the_backward_pass_loses_its_gradients(pair, batch, checkpointing):
    """The fault that roles keep out, with and without checkpointing: peft's own switch freezes what it leaves."""
    model = pair["policy"].loaded.model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with pair.role("policy", train=True):
        token_logprobs(model, batch)[0].sum().backward()
    assert all(weight.grad is not None for weight in pair.trained("policy").values())
    model.zero_grad(set_to_none=True)
    with pair.role("policy", train=True):
        loss = token_logprobs(model, batch)[0].sum()
        model.set_adapter("critic")
        loss.backward()
    assert all(weight.grad is None for weight in pair.trained("policy").values())


def test_an_open_role_keeps_others_out_until_its_backward_pass_is_done(pair, batch):
    with pair.role("policy", train=True) as model:
        loss = token_logprobs(model, batch)[0].sum()
        with pytest.raises(RuntimeError, match=r"role 'policy' is still open.*asking for 'critic'"):
            pair.role("critic", train=True).__enter__()
        loss.backward()
    assert all(weight.grad is not None for weight in pair.trained("policy").values())
    assert all(weight.grad is None for weight in pair.trained("critic").values())


def test_a_role_that_failed_is_closed(pair):
    with pytest.raises(ZeroDivisionError), pair.role("policy", train=True):
        raise ZeroDivisionError
    with pair.role("critic"):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_each_role_sees_its_own_adapter_whoever_was_open_before(pair, batch):
    alone = {name: logprobs(pair, name, batch) for name in ("policy", "critic", "base")}
    assert torch.equal(alone["policy"], alone["base"])  # a fresh adapter does nothing
    assert not torch.equal(alone["critic"], alone["base"])
    for name in ("critic", "policy", "critic", "base", "policy", "base", "critic"):
        assert torch.equal(logprobs(pair, name, batch), alone[name])


def test_an_adapter_set_from_outside_does_not_stick(pair, batch):
    before = logprobs(pair, "policy", batch)
    activate(pair["critic"].loaded.model, "critic")
    assert torch.equal(logprobs(pair, "policy", batch), before)


def test_a_trained_head_learns_with_its_adapter(pair, batch):
    with pair.role("critic", train=True) as model:
        values(model, batch).sum().backward()
    trained = pair.trained("critic")
    assert trained["score.weight"] is pair["critic"].head.weight
    assert all(weight.grad is not None for weight in trained.values())
    assert all(weight.grad is None for weight in pair.trained("policy").values())
    assert not pair.trained("base")
