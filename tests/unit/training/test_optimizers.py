"""Optimisers: which class, and what is decayed."""

import pytest
import torch

from tuner.config import AdamW
from tuner.training.optimizers import make_optimizer


def parameters():
    torch.manual_seed(0)
    return {
        "matrix": torch.nn.Parameter(torch.randn(64, 128)),
        "norm": torch.nn.Parameter(torch.ones(64)),
    }


def test_only_matrices_are_decayed():
    weights = parameters()
    optimizer = make_optimizer(AdamW(lr=0.1, weight_decay=0.5), weights)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weights["matrix"], before["matrix"] * (1 - 0.1 * 0.5))
    assert torch.equal(weights["norm"], before["norm"])


@pytest.mark.parametrize("config", [AdamW(), AdamW(bits=8), AdamW(paged=True), AdamW(bits=8, paged=True)])
def test_every_kind_takes_a_step(config):
    weights = parameters()
    optimizer = make_optimizer(config, weights)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    kind = type(optimizer).__name__
    assert ("8bit" in kind) == (config.bits == 8)
    assert ("Paged" in kind) == config.paged
    torch.testing.assert_close(weights["norm"], torch.full((64,), 1 - config.lr), rtol=1e-5, atol=1e-6)
