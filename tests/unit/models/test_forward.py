"""Heads that are more than one matrix take the general way, to the same loss."""

import pytest
import torch

from tuner.config import LoRA, Model
from tuner.data.batch import make_batch
from tuner.models.forward import logits, token_loss
from tuner.models.load import load_model
from tuner.models.unwrap import unwrapped

CPU = torch.device("cpu")


def row():
    import numpy as np

    generator = np.random.default_rng(0)
    return make_batch(
        [
            (generator.integers(10, 500, n).astype(np.int32), np.linspace(0, 1, n, dtype=np.float32))
            for n in (9, 14)
        ]
    )


def written_out(model, batch):
    with torch.no_grad():
        logprobs = logits(model, batch).log_softmax(-1)
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
