"""Quantised weights: exact on the way back, and still trained through after answers were generated."""

import copy

import pytest
import torch

from tests.whole_models import dequantized_weights
from tuner.config import LoRA, Model
from tuner.models.generate import generate
from tuner.models.load import load_model
from tuner.models.quantization import (
    dequantize,
    optimizer_class,
    quantized_layers,
)


def load(folder, quantization, precision="fp32", adapter=None):
    loaded = load_model(
        Model(path=str(folder), quantization=quantization),
        precision=precision,
        device=torch.device("cpu"),
        adapter=adapter,
        seed=0,
    )
    loaded.transformer.set_attn_implementation("sdpa")
    return loaded


def gradients(model, tokens, precision):
    model.zero_grad()
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_all_linear_layers_but_the_head_are_quantised(internlm2_folder, quantization):
    model = load(internlm2_folder, quantization).model
    names = {name for name, _ in quantized_layers(model)}
    assert len(names) == 2 * 7
    assert "lm_head" not in names


def test_nf4_is_double_quantised_and_near_the_original(internlm2_folder):
    plain, quantised = load(internlm2_folder, None).model, load(internlm2_folder, "nf4").model
    weights = plain.state_dict()
    for name, back in dequantized_weights(quantised).items():
        assert quantised.get_parameter(name).quant_state.nested
        assert ((back - weights[name]).norm() / weights[name].norm()) < 0.12


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_dequantised_model_is_an_ordinary_one(internlm2_folder, tmp_path, tokens, quantization):
    model = load(internlm2_folder, quantization).model
    with torch.no_grad():
        before = model(input_ids=tokens, use_cache=False).logits
        dequantize(model)
        after = model(input_ids=tokens, use_cache=False).logits
    assert not any(quantized_layers(model))
    # LLM.int8() rounds activations too, which is not in the weights
    assert (after - before).abs().max() < (1e-5 if quantization == "nf4" else 5e-2)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_generating_does_not_disturb_training(internlm2_folder, tokens, precision):
    """The AVX512-BF16 trap: repacked for inference, 4-bit layers pass no gradient on."""
    loaded = load(internlm2_folder, "nf4", precision, LoRA(r=4))
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    fresh = gradients(loaded.model, tokens, precision)
    answers = generate(loaded.model, [[17, 18], [19]], max_new_tokens=4, end_ids=())
    assert [len(answer.tokens) for answer in answers] == [4, 4]
    after = gradients(loaded.model, tokens, precision)
    assert fresh.keys() == after.keys()
    for name in fresh:
        assert fresh[name].abs().sum() > 0
        assert torch.equal(fresh[name], after[name]), name


def test_no_layer_may_repack_its_weights(internlm2_folder, monkeypatch):
    """Holds on CPUs without AVX512-BF16 too: the library decides when the layer is built."""
    import bitsandbytes.nn.modules as modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    for _, layer in quantized_layers(load(internlm2_folder, "nf4").model):
        assert layer.support_avx512bf16_for_cpu is False


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize(
    ("bits", "paged", "name"),
    [
        (32, False, "AdamW"),
        (8, False, "AdamW8bit"),
        (32, True, "PagedAdamW32bit"),
        (8, True, "PagedAdamW8bit"),
    ],
)
def test_optimisers_step_and_decay(bits, paged, name):
    kind = optimizer_class(bits, paged)
    assert kind.__name__ == name
    weight = torch.nn.Parameter(torch.ones(128, 64))
    exact = copy.deepcopy(weight)
    steps = [
        kind([weight], lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1),
    ]
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for parameter, optimizer in zip((weight, exact), steps, strict=True):
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight, exact, atol=2e-3, rtol=0)
