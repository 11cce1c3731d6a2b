"""Adapters beside one base: what a copy shares with its source, and what it does not."""

import numpy as np
import pytest
import torch

from tuner.config import LoRA, Model
from tuner.data.batch import make_batch
from tuner.models.adapters import ADAPTER, activate, copy_adapter
from tuner.models.forward import token_logprobs
from tuner.models.load import load_model

CPU = torch.device("cpu")


@torch.no_grad()
def logprobs(model, tokens) -> torch.Tensor:
    """The log-probability of each token."""
    batch = make_batch([(tokens[0].int().numpy(), np.ones(tokens.shape[1], dtype=np.float32))])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        return token_logprobs(model, batch)[0]


@pytest.mark.parametrize(
    "base",
    [{"precision": "fp32"}, {"precision": "bf16"}, {"precision": "bf16", "quantization": "nf4"}],
    ids=["fp32", "bf16", "nf4"],
)
@pytest.mark.parametrize("whole", [(), ("embed_tokens",)], ids=["lora", "embedding"])
def test_a_copy_leaves_the_base_where_it_lies(base, whole, tokens):
    """The adapter alone is copied, with what it trains whole; its base stays the same tensors."""
    model = load_model(
        Model(path="tuner:tiny", quantization=base.get("quantization")),
        precision=base["precision"],
        device=CPU,
        adapter=LoRA(r=4, train_whole=whole),
    ).model
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.02)
    expected = logprobs(model, tokens)
    before = {name: (weight, weight.data_ptr()) for name, weight in model.named_parameters()}
    copy_adapter(model, ADAPTER, "other")
    after = dict(model.named_parameters())
    for name, (weight, place) in before.items():
        assert after[name] is weight, name
        assert weight.data_ptr() == place, name
    copied = after.keys() - before.keys()
    assert copied == {
        name.replace(f".{ADAPTER}", ".other") for name in before if f".{ADAPTER}." in f"{name}."
    }
    assert not {after[name].data_ptr() for name in copied} & {place for _, place in before.values()}
    activate(model, "other")
    assert torch.equal(logprobs(model, tokens), expected)
    for name in copied:
        after[name].data.zero_()
    assert not torch.equal(logprobs(model, tokens), expected)
    activate(model, ADAPTER)
    assert torch.equal(logprobs(model, tokens), expected)
