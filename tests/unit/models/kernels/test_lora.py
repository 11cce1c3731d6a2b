"""Fused LoRA layers are peft's: results and gradients up to rounding, in every way of recomputation."""

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.bounds import model_rounding
from tests.unit.models.test_checkpointing import Products, learned, load
from tuner.config import LoRA
from tuner.data.batch import make_batch
from tuner.models.adapters import activate, copy_adapter
from tuner.models.arithmetic import autocast
from tuner.models.checkpointing import recompute_activations
from tuner.models.forward import token_loss
from tuner.models.kernels.lora import install, unavailable

CPU = torch.device("cpu")
ADAPTER = LoRA(r=4, alpha=6)
TOKENS = 60


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    return make_batch([(draw.integers(20, 900, TOKENS).astype(np.int32), np.ones(TOKENS, np.float32))])


def pair(folder, way=False, quantization=None, adapter=ADAPTER, precision="fp32", tile=None):
    plain, fused = (load(folder, way, quantization, adapter, precision, tile) for _ in range(2))
    assert install(fused) > 0
    return plain, fused


def assert_equal(plain, fused, limit):
    (losses, gradients), (fused_losses, fused_gradients) = plain, fused
    assert fused_losses == pytest.approx(losses, rel=limit)
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():
        assert fused_gradients[name].dtype == gradient.dtype
        assert (fused_gradients[name] - gradient).norm() <= limit * gradient.norm(), name


def fp32_limit(model):
    return model_rounding(model.get_base_model().config, torch.float32, backward=True)


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("way", [False, True, "selective", "offload"])
@pytest.mark.parametrize("tile", [None, 16])
def test_equal_to_peft(internlm2_folder, batch, quantization, way, tile):
    plain, fused = pair(internlm2_folder, way, quantization, tile=tile)
    assert_equal(learned(plain, batch), learned(fused, batch), fp32_limit(plain))


@pytest.mark.parametrize("way", [True, "selective", "offload"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_way_of_recomputation_changes_a_bit(internlm2_folder, batch, way, precision):
    results = []
    for how in (False, way):
        _, fused = pair(internlm2_folder, how, "nf4", precision=precision)
        results.append(learned(fused, batch, precision))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


@pytest.mark.parametrize("is_first", [True, False])
def test_selective_recomputation_takes_it_in_either_order(internlm2_folder, batch, is_first):
    """And computes none of its products again: as many in a backward pass as where all is kept."""
    counts = []
    for way in (False, "selective"):
        model = load(internlm2_folder, False, "nf4", ADAPTER)
        if is_first:
            install(model)
        recompute_activations(model, way)
        if not is_first:
            install(model)
        loss = token_loss(model, batch)
        with Products() as products:
            loss.backward()
        counts.append(products.count)
    assert counts[0] == counts[1]


def layer_with(folder, quantization=None):
    """A layer of a model with an adapter, plain and fused on the same weights."""
    plain, fused = pair(folder, quantization=quantization)
    return (model.get_base_model().model.layers[0].mlp.gate_proj for model in (plain, fused))


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("frozen", ["", "A", "B", "AB"])
def test_a_layer_with_frozen_factors(internlm2_folder, quantization, frozen):
    results = []
    for layer in layer_with(internlm2_folder, quantization):
        for kind in frozen:
            getattr(layer, f"lora_{kind}")["default"].weight.requires_grad_(False)
        torch.manual_seed(0)
        x = torch.randn(1, 33, layer.in_features, requires_grad=True)
        result = layer(x)
        result.backward(torch.randn(result.shape))
        factors = [getattr(layer, f"lora_{kind}")["default"].weight.grad for kind in "AB"]
        results.append([result.detach(), x.grad, *factors])
    for plain, fused in zip(*results, strict=True):
        assert (plain is None) == (fused is None)
        if plain is not None:
            assert (fused - plain).norm() <= 1e-6 * plain.norm()


def test_bf16_is_no_farther_from_fp32_than_peft(internlm2_folder, batch):
    """Each sum is rounded once in place of up to three times; two draws of rounding errors may differ by chance."""
    plain, fused = pair(internlm2_folder, False, "nf4", precision="bf16")
    exact = learned(load(internlm2_folder, False, "nf4", ADAPTER), batch, passes=1)[1]

    def error(gradients):
        return (
            sum((gradients[name] - gradient).square().sum().item() for name, gradient in exact.items()) ** 0.5
        )

    errors = [error(learned(model, batch, "bf16", passes=1)[1]) for model in (plain, fused)]
    norm = sum(gradient.square().sum().item() for gradient in exact.values()) ** 0.5
    assert errors[0] > fp32_limit(plain) * norm  # products were in bf16
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("state", ["dropout", "none", "other", "merged", "disabled", "hook"])
def test_fallbacks_and_roles(internlm2_folder, batch, state):
    adapter = LoRA(r=4, dropout=0.4) if state == "dropout" else ADAPTER
    losses = []
    for model in pair(internlm2_folder, adapter=adapter):
        if state == "none":
            activate(model, None)
        elif state == "other":
            copy_adapter(model, "default", "other")
            for name, weight in model.named_parameters():
                if ".lora_B.other." in name:
                    weight.data.mul_(-2)
            activate(model, "other")
        elif state == "merged":
            model.merge_adapter()
        elif state == "disabled":
            model.base_model.disable_adapter_layers()
        elif state == "hook":
            seen = []
            layer = model.get_base_model().model.layers[0].mlp.down_proj
            layer.lora_A["default"].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        torch.manual_seed(1)
        losses.append(token_loss(model, batch).item())
        assert state != "hook" or seen
    assert losses[1] == pytest.approx(losses[0], rel=fp32_limit(model))
    assert state in ("other", "hook") or losses[0] == losses[1]


def test_a_result_is_of_the_weights_as_they_are(internlm2_folder):
    """Of layers that share an input, one that is called after a step has the new weights' result."""
    _, fused = pair(internlm2_folder)
    block = fused.get_base_model().model.layers[0].mlp
    x = torch.randn(1, 9, block.gate_proj.in_features)
    with torch.no_grad():
        block.gate_proj(x)
        block.up_proj.lora_B["default"].weight.mul_(3)
        late = block.up_proj(x)
        assert torch.equal(late, block.up_proj(x.clone()))


def test_a_pass_without_gradients_has_the_loss_of_one_with(internlm2_folder, batch):
    """As PPO's ratio of two passes needs it."""
    _, fused = pair(internlm2_folder, quantization="nf4", precision="bf16")
    with autocast(CPU, "bf16"):
        with torch.no_grad():
            without = token_loss(fused.eval(), batch)
        assert torch.equal(without, token_loss(fused.train(), batch).detach())


def kept_bytes(model, batch):
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with autocast(CPU, "bf16"), saved_tensors_hooks(pack, lambda tensor: tensor):
        token_loss(model, batch)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_less_is_kept(internlm2_folder, batch, quantization):
    plain, fused = pair(internlm2_folder, quantization=quantization, precision="bf16")
    assert kept_bytes(fused, batch) < kept_bytes(plain, batch)


def test_names_and_weights_stay(internlm2_folder):
    plain, fused = pair(internlm2_folder)
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in fused.named_modules()]
    assert install(fused) == 0  # a second time


def test_a_training_run_has_the_same_losses(internlm2_folder, batch):
    losses = []
    for model in pair(internlm2_folder):
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer, own = torch.optim.SGD(weights, lr=0.05), []
        for _ in range(5):
            loss = token_loss(model, batch) / TOKENS
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(loss.item())
        losses.append(own)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_where_it_runs():
    assert unavailable(CPU) is None
    assert "mps" in (unavailable(torch.device("mps")) or "")
