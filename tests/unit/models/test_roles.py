"""Roles: one open at a time, over its backward pass."""

import pytest
import torch

from tuner.config import LoRA, Model
from tuner.models.load import load_model
from tuner.models.roles import Roles


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
