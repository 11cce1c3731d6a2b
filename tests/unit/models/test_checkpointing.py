"""What is computed again changes memory and time, and no bit of a loss or a gradient."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.config import Freeze, LoRA, Model
from tuner.data.batch import make_batch
from tuner.models import kept_products, offload
from tuner.models.arithmetic import autocast
from tuner.models.checkpointing import recompute_activations
from tuner.models.forward import scores, token_loss
from tuner.models.load import load_model
from tuner.models.tiled_mlp import tile_mlps

CPU = torch.device("cpu")
WAYS = (True, "selective", "offload")
DROPPED = LoRA(r=4, dropout=0.3)
KINDS = {
    "full": (None, None),
    "lora": (None, DROPPED),
    "nf4": ("nf4", DROPPED),
    "int8": ("int8", DROPPED),
}


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    lengths = (20, 33, 7)
    return make_batch(
        [(draw.integers(20, 900, length).astype(np.int32), np.ones(length, np.float32)) for length in lengths]
    )


def load(folder, way, quantization=None, adapter=None, precision="fp32", tile=None, **settings):
    model = Model(path=str(folder), quantization=quantization)
    loaded = load_model(model, precision=precision, device=CPU, adapter=adapter, seed=0, **settings)
    recompute_activations(loaded.model, way)
    tile_mlps(loaded.model, tile)
    torch.manual_seed(2)
    for name, weight in loaded.model.named_parameters():
        if ".lora_B." in name:  # of zeros, the adapter would take no part
            weight.data.normal_(std=0.1)
    return loaded.model.train()


def learned(model, batch, precision="fp32", loss=token_loss, passes=2):
    """Losses of some passes in which dropout goes on, and the gradients that they add up to."""
    torch.manual_seed(1)
    losses = []
    with autocast(CPU, precision):
        for _ in range(passes):
            value = loss(model, batch)
            value.backward()
            losses.append(value.item())
    return losses, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_bits(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())


class Products(TorchDispatchMode):
    """Counts products of matrices that are computed inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in kept_products.PRODUCTS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [None, 16])
def test_no_way_changes_a_bit(internlm2_folder, batch, kind, precision, tile):
    quantization, adapter = KINDS[kind]
    kept, *others = (
        learned(load(internlm2_folder, way, quantization, adapter, precision, tile), batch, precision)
        for way in (False, *WAYS)
    )
    assert kept[0][0] != kept[0][1] or adapter is None  # dropout drops
    for other in others:
        assert_same_bits(kept, other)


@pytest.mark.parametrize("way", WAYS)
def test_a_reward_model(internlm2_folder, batch, way):
    kept, other = (
        learned(
            load(internlm2_folder, how, "nf4", DROPPED, "bf16", head="score"),
            batch,
            "bf16",
            lambda model, row: scores(model, row).square().sum(),
        )
        for how in (False, way)
    )
    assert_same_bits(kept, other)


@pytest.mark.parametrize("kind", ["full", "lora", "nf4"])
def test_selective_computes_no_kept_product_again(internlm2_folder, batch, kind):
    """Beside the products of the forward and backward pass only an adapter's second factors, one for each."""
    counts = {}
    for way in (False, "selective", True):
        quantization, adapter = KINDS[kind]
        model = load(internlm2_folder, way, quantization, adapter, "bf16")
        with autocast(CPU, "bf16"):
            loss = token_loss(model, batch)
            with Products() as products:
                loss.backward()
        counts[way] = products.count
    factors = sum(name.endswith(".lora_B.default.weight") for name, _ in model.named_parameters())
    layers = model.get_base_model().model.layers if adapter else model.model.layers
    # the last factor's result is needed by nothing: each layer stops before it
    assert counts["selective"] - counts[False] == max(0, factors - len(layers))
    assert counts["selective"] < counts[True]


def test_a_product_that_is_changed_in_place_is_an_error(internlm2_folder, batch):
    model = load(internlm2_folder, "selective")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, result: result.mul_(2))
    loss = token_loss(model, batch)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_other_operations_the_second_time_are_an_error(internlm2_folder, batch):
    model = load(internlm2_folder, "selective")
    loss = token_loss(model, batch)
    layer = model.model.layers[0]
    layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(layer.self_attn.q_proj.out_features))
    with pytest.raises(RuntimeError, match="must not change"):
        loss.backward()


@pytest.fixture
def waiting(monkeypatch):
    """Every input that waits, and the most that were on the device as one was given out or sent."""
    inputs, most = [], [0]

    class Watched(offload._Input):
        def __init__(self, hidden, before):
            inputs.append(self)
            super().__init__(hidden, before)

        def given_out(self):
            is_second = self._first is None
            hidden = super().given_out()
            if is_second:
                most[0] = max(most[0], 1 + sum(own._near is not None for own in inputs))
            return hidden

        def send(self):
            super().send()
            most[0] = max(most[0], sum(own._near is not None for own in inputs if own._far is not None))

    monkeypatch.setattr(offload, "_Input", Watched)
    return inputs, most


def test_offload_holds_two_inputs_on_the_device(internlm2_folder, batch, waiting):
    inputs, most = waiting
    model = load(internlm2_folder, "offload", "nf4", DROPPED)
    stack = model.get_base_model().model.layers
    stack.extend([stack[0], stack[1], stack[0]])  # deeper, or two would be all there are
    model.get_base_model().config.num_hidden_layers = len(stack)
    model.get_base_model().model.config.layer_types = None
    learned(model, batch, passes=1)
    assert len(inputs) == len(stack)
    assert all(own._far is not None and own._is_used for own in inputs)
    assert most[0] == 2
    assert all(own._near is None for own in inputs)


def test_what_needs_no_gradient_is_not_sent(internlm2_folder, batch, waiting):
    inputs, _ = waiting
    model = load(internlm2_folder, "offload", adapter=LoRA(r=4), freeze=Freeze(all_but_last_layers=1))
    with torch.no_grad():
        token_loss(model, batch)
    assert all(own._far is None for own in inputs)
    inputs.clear()
    learned(model, batch, passes=1)
    assert [own._far is not None for own in inputs] == [False, True]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tile", [None, 16])
def test_rows_whose_backward_pass_comes_later_or_never(internlm2_folder, batch, way, tile):
    """Two passes before their backward passes, in either order, beside one that is given up."""
    other = make_batch([(np.arange(20, 60, dtype=np.int32), np.ones(40, np.float32))])

    def gradients(how, rows):
        model = load(internlm2_folder, how, adapter=LoRA(r=4), tile=tile)
        losses = [token_loss(model, row) for row in (batch, other)]
        failed = token_loss(model, batch)
        del failed
        for index in rows:
            losses[index].backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    for rows in ((0, 1), (1, 0), (1,)):
        kept, again = gradients(False, rows), gradients(way, rows)
        assert all(torch.equal(gradient, again[name]) for name, gradient in kept.items())


@pytest.mark.parametrize("way", WAYS)
def test_a_pass_after_one_that_failed(internlm2_folder, batch, way):
    """As after a full memory in the middle of a layer."""
    model = load(internlm2_folder, way, adapter=LoRA(r=4))
    down = model.get_base_model().model.layers[1].mlp.down_proj
    hook = down.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        token_loss(model, batch)
    hook.remove()
    assert_same_bits(learned(load(internlm2_folder, False, adapter=LoRA(r=4)), batch), learned(model, batch))
