"""MLPs in tiles are MLPs: equal up to rounding, with the inside of one tile alone."""

import numpy as np
import pytest
import torch

from tests.bounds import rounding
from tests.unit.models.test_checkpointing import load
from tuner.config import LoRA
from tuner.data.batch import make_batch
from tuner.errors import UserError
from tuner.models.forward import token_loss
from tuner.models.tiled_mlp import mlp_of, refuse_tiles

TILE, TOKENS = 16, 60
FAMILIES = (
    "internlm2",
    "internlm3",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
)
KINDS = {"full": (None, None), "lora": (None, LoRA(r=4)), "nf4": ("nf4", LoRA(r=4))}


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    return make_batch([(draw.integers(20, 900, TOKENS).astype(np.int32), np.ones(TOKENS, np.float32))])


def learned(model, batch):
    loss = token_loss(model, batch)
    loss.backward()
    return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def bound(config):
    """Of a gradient's norm: nine products a layer and the head, forward and backward, and sums over the tokens."""
    terms = max(config.intermediate_size, config.hidden_size, TOKENS)
    return rounding(torch.float32, terms, 2 * (9 * config.num_hidden_layers + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [False, True, "selective", "offload"])
def test_equal_but_for_rounding(internlm2_folder, batch, kind, way):
    whole, tiled = (load(internlm2_folder, way, *KINDS[kind], tile=tile) for tile in (None, TILE))
    (loss, gradients), (of_tiles, tiled_gradients) = learned(whole, batch), learned(tiled, batch)
    limit = bound((whole.get_base_model() if KINDS[kind][1] else whole).config)
    assert of_tiles.item() == pytest.approx(loss.item(), rel=limit)
    assert gradients.keys() == tiled_gradients.keys()
    for name, gradient in gradients.items():
        assert (tiled_gradients[name] - gradient).norm() <= limit * gradient.norm(), name


def test_dropout_is_that_of_tiles_one_after_another(internlm2_folder, batch):
    """The same as autograd has it, of tiles that are computed plainly: dropped places return in the backward pass."""
    adapter = LoRA(r=4, dropout=0.5)
    tiled, plain = (load(internlm2_folder, True, None, adapter, tile=tile) for tile in (TILE, None))
    for layer in plain.get_base_model().model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda hidden, forward=forward: torch.cat(
            [forward(tile) for tile in hidden.split(TILE, 1)], 1
        )
    results = []
    for model in (tiled, plain):
        torch.manual_seed(3)
        results.append(learned(model, batch))
    (loss, gradients), (plain_loss, plain_gradients) = results
    assert torch.equal(loss, plain_loss)
    limit = bound(plain.get_base_model().config)
    for name, gradient in plain_gradients.items():
        assert (gradients[name] - gradient).norm() <= limit * gradient.norm(), name


def test_no_tile_is_wider_than_said_and_the_forward_pass_is_not_made_a_third_time(internlm2_folder, batch):
    model = load(internlm2_folder, True, tile=TILE)
    widths = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda _, __, result: widths.append(result.shape[1]))
    learned(model, batch)
    tiles = [TILE] * (TOKENS // TILE) + [TOKENS % TILE]
    assert widths == 2 * tiles + 2 * tiles  # two layers forward, and each again in its backward pass
    widths.clear()
    with torch.no_grad():
        token_loss(model, batch)
    assert widths == 2 * tiles


def test_a_pass_without_gradients_has_the_loss_of_one_with(internlm2_folder, batch):
    """As PPO's ratio of two passes needs it."""
    model = load(internlm2_folder, True, "nf4", LoRA(r=4), tile=TILE)
    with torch.no_grad():
        without = token_loss(model, batch)
    assert torch.equal(without, token_loss(model, batch).detach())


def test_adapters_of_the_lowest_mlp_alone(internlm2_folder, batch):
    """Whose input needs no gradient."""
    adapter = LoRA(r=4, targets=("gate_proj", "down_proj"))
    whole, tiled = (
        learned(load(internlm2_folder, True, None, adapter, tile=tile), batch) for tile in (None, TILE)
    )
    assert whole[1].keys() == tiled[1].keys()
    assert all(gradient.abs().max() > 0 for gradient in tiled[1].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
    shape |= {"n_embd": 64, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, pad_token_id=0))
    refuse_tiles(model)
    stack = model.transformer.h if family == "gpt2" else model.model.layers
    assert [mlp_of(layer) is layer.mlp for layer in stack] == [True, True]


def test_experts_are_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 300, "num_local_experts": 4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **shape))
    with pytest.raises(UserError, match="mixtures of experts"):
        refuse_tiles(model)
