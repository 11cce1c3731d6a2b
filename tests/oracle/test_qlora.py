"""QLoRA is LoRA on the de-quantised base, to the bit: outputs and every gradient."""

import pytest
import torch

from tests.whole_models import dequantized_weights
from tuner.config import LoRA, Model
from tuner.models.load import load_model
from tuner.models.quantization import quantized_layers
from tuner.models.tiny import tiny_model_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["internlm/internlm2-7b", "Qwen/Qwen3-8B"])
def folder(request, tmp_path_factory):
    return tiny_model_folder(request.param, tmp_path_factory.mktemp("model"))


def load(folder, quantization, lora):
    loaded = load_model(
        Model(path=str(folder), quantization=quantization),
        precision="fp32",
        device=CPU,
        adapter=lora,
        seed=3,
    )
    loaded.transformer.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(4)
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:  # zero when fresh, and then A has no gradient
            weight.data.normal_(std=0.05, generator=generator)
    return loaded.model


@pytest.mark.parametrize("lora", [LoRA(r=4, alpha=8), LoRA(r=8, targets=("q_proj", "down_proj"))])
def test_outputs_and_gradients(folder, lora):
    quantised, plain = load(folder, "nf4", lora), load(folder, None, lora)
    assert any(quantized_layers(quantised))
    weights = plain.state_dict()
    for name, weight in dequantized_weights(quantised).items():
        weights[name].copy_(weight)
    tokens = torch.randint(16, 1000, (2, 33), generator=torch.Generator().manual_seed(5))
    outputs = []
    for model in (quantised, plain):
        model.train()
        output = model(input_ids=tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        outputs.append(output)
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for (name, one), other in zip(quantised.named_parameters(), plain.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
        if one.requires_grad:
            assert one.grad.abs().sum() > 0
            assert torch.equal(one.grad, other.grad), name


def test_the_quantised_base_is_not_the_original(folder):
    """The equality above is not that of a model that was never quantised."""
    plain = load(folder, None, LoRA(r=4)).state_dict()
    for name, weight in dequantized_weights(load(folder, "nf4", LoRA(r=4))).items():
        assert 0.05 < (plain[name] - weight).norm() / weight.norm() < 0.15
