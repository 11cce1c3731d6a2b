"""Frozen weights stay, and what lies below the last trained one costs no backward pass."""

import pytest
import torch

from tuner.config import Freeze, LoRA, Model
from tuner.errors import UserError
from tuner.models.checkpointing import recompute_activations
from tuner.models.load import load_model


def load(folder, adapter=None, **freeze):
    return load_model(
        Model(path=str(folder)),
        precision="fp32",
        device=torch.device("cpu"),
        adapter=adapter,
        freeze=Freeze(**freeze),
        seed=0,
    )


def trained(loaded):
    return {name for name, weight in loaded.model.named_parameters() if weight.requires_grad}


def test_the_last_layers_the_norm_and_the_head_are_trained(internlm2_folder):
    names = trained(load(internlm2_folder, all_but_last_layers=1))
    assert {"model.norm.weight", "lm_head.weight"} < names
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"1"}
    assert "model.embed_tokens.weight" not in names


def test_the_same_for_adapters(internlm2_folder):
    names = trained(load(internlm2_folder, LoRA(r=4, train_whole=("lm_head",)), all_but_last_layers=1))
    assert {name.split(".layers.")[1].split(".")[0] for name in names if ".layers." in name} == {"1"}
    assert any("lm_head" in name for name in names)


def test_patterns_name_weights_with_and_without_adapter(internlm2_folder):
    full = trained(load(internlm2_folder, names=("model.embed_tokens.*", "*norm*")))
    assert not any("norm" in name or "embed" in name for name in full)
    adapted = trained(load(internlm2_folder, LoRA(r=4), names=("model.layers.0.*.lora_A.weight",)))
    assert not any("layers.0" in name and "lora_A" in name for name in adapted)
    assert any("layers.0" in name and "lora_B" in name for name in adapted)


@pytest.mark.parametrize("pattern", ["transformer.*", "model.layers.0.self_attn.q_proj.weight"])
def test_a_pattern_that_freezes_no_trained_weight_is_an_error(internlm2_folder, pattern):
    with pytest.raises(UserError, match=r"freeze\.names.*matches no trained weight"):
        load(internlm2_folder, LoRA(r=4), names=(pattern,))


def test_freezing_everything_is_an_error(internlm2_folder):
    with pytest.raises(UserError, match="nothing is left to train"):
        load(internlm2_folder, names=("*",))


def test_more_layers_than_there_are_is_an_error(internlm2_folder):
    with pytest.raises(UserError, match="the model has 2 layers"):
        load(internlm2_folder, all_but_last_layers=3)


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_checkpointing_changes_no_gradient(internlm2_folder, tokens, adapter):
    gradients = []
    for checkpointing in (False, True):
        model = load(internlm2_folder, adapter, all_but_last_layers=1).transformer
        model.set_attn_implementation("sdpa")
        if checkpointing:
            recompute_activations(model)
            assert model.is_gradient_checkpointing
        model.train()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_frozen_layers_below_cost_no_backward_pass(internlm2_folder, tokens, adapter, checkpointing):
    model = load(internlm2_folder, adapter, all_but_last_layers=1).transformer
    model.set_attn_implementation("sdpa")
    if checkpointing:
        recompute_activations(model)
    model.train()
    outputs, backwards = [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
        layer.register_full_backward_hook(lambda module, *_: backwards.append(module))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert outputs[0].grad_fn is None
    assert not outputs[0].requires_grad
    assert outputs[1].grad_fn is not None
    assert backwards == [model.model.layers[1]]
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())
