"""Rotary settings: written once, kept through saving, and a function of the sample alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tuner.config import LoRA, Model, Rope
from tuner.errors import UserError
from tuner.models.load import load_model
from tuner.models.rope import SegmentedDynamicRotary, apply_rope, describe_rope, trained_length
from tuner.models.save import save_model

CPU = torch.device("cpu")


def llama(**values):
    parameters = {"rope_type": "default", "rope_theta": 1e4}
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=32,
        **{"rope_parameters": parameters} | values,
    )


def test_no_rope_keeps_the_checkpoints():
    config = llama()
    apply_rope(None, config)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


def test_a_base_alone_keeps_the_scaling():
    config = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    apply_rope(Rope(base=1e6), config)
    assert config.rope_parameters == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}


@pytest.mark.parametrize(("scaling", "length"), [("linear", 128), ("yarn", 128), ("dynamic", 32)])
def test_scaling_grows_the_length_where_it_is_not_the_trained_one(scaling, length):
    config = llama()
    for _ in range(2):  # a saved model is scaled already: asking again changes nothing
        apply_rope(Rope(base=5e5, scaling=scaling, factor=4.0), config)
        assert config.max_position_embeddings == length
        assert trained_length(config) == 32
        assert config.rope_parameters["rope_type"] == scaling
        assert config.rope_parameters["rope_theta"] == 5e5
    LlamaRotaryEmbedding(config)
    assert describe_rope(config) == f"base 500,000, trained for 32 tokens, {scaling} scaling × 4 to 128"


def test_yarn_at_factor_one_point_five_differs_from_linear():
    yarn, linear = llama(), llama()
    apply_rope(Rope(scaling="yarn", factor=4.0), yarn)
    apply_rope(Rope(scaling="linear", factor=4.0), linear)
    first, second = LlamaRotaryEmbedding(yarn), LlamaRotaryEmbedding(linear)
    assert torch.equal(second.inv_freq * 4, LlamaRotaryEmbedding(llama()).inv_freq)
    assert first.inv_freq[0] == second.inv_freq[0] * 4  # the fastest positions are not squeezed
    assert first.attention_scaling > 1


def test_a_model_without_rotary_positions_is_refused():
    with pytest.raises(UserError, match=r"model\.rope: gpt2"):
        apply_rope(Rope(base=1e6), GPT2Config())


@pytest.mark.parametrize("length", [8, 32, 33, 60])
def test_one_segment_equals_transformers(length):
    config = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    positions = torch.arange(length)[None]
    x = torch.zeros(1, 1)
    for ours, theirs in zip(
        SegmentedDynamicRotary(config)(x, positions), LlamaRotaryEmbedding(config)(x, positions), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_segment_does_not_feel_its_neighbours_nor_the_past():
    """transformers' own does: it takes the longest segment's scale for all, and remembers it."""
    config = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    rotary, x = SegmentedDynamicRotary(config), torch.zeros(1, 1)
    lengths = (40, 5, 1, 60, 32)
    alone = [rotary(x, torch.arange(length)[None])[0] for length in lengths]
    packed = torch.cat([torch.arange(length) for length in lengths])[None]
    assert torch.equal(rotary(x, packed)[0], torch.cat(alone, dim=1))
    theirs = LlamaRotaryEmbedding(config)
    assert not torch.equal(theirs(x, packed)[0], torch.cat(alone, dim=1))


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_rope_is_saved_with_the_model(internlm2_folder, tmp_path, scaling, adapter):
    rope = Rope(base=5e6, scaling=scaling, factor=2.0)
    model = Model(path=str(internlm2_folder), rope=rope)
    loaded = load_model(model, precision="fp32", device=CPU, adapter=adapter)
    save_model(loaded, tmp_path / "model")
    again = load_model(Model(path=str(tmp_path)), precision="fp32", device=CPU)
    without_weights = load_model(Model(path=str(tmp_path)), precision="fp32", device=torch.device("meta"))
    for config in (again.transformer.config, without_weights.transformer.config):
        assert config.rope_parameters["rope_theta"] == 5e6
        assert config.rope_parameters["rope_type"] == scaling
        assert describe_rope(config) == describe_rope(loaded.transformer.config)
    rotary = again.transformer.model.rotary_emb
    assert isinstance(rotary, SegmentedDynamicRotary) == (scaling == "dynamic")


def test_dynamic_scaling_reaches_the_logits(internlm2_folder, tokens):
    """Past the trained length a scaled model differs from an unscaled one, and not before."""
    plain = AutoModelForCausalLM.from_pretrained(internlm2_folder)
    plain.config.max_position_embeddings = 16
    apply_rope(Rope(scaling="dynamic", factor=2.0), plain.config)
    scaled = SegmentedDynamicRotary(plain.config)
    unscaled = plain.model.rotary_emb
    positions = torch.arange(24)[None]
    assert torch.equal(scaled(tokens, positions[:, :16])[0], unscaled(tokens, positions[:, :16])[0])
    assert not torch.equal(scaled(tokens.float(), positions)[0], unscaled(tokens.float(), positions)[0])
