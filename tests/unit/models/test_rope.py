"""Rotary settings: written once, kept through saving, and a function of the sample alone."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tuner.config import LoRA, Model, Rope
from tuner.errors import UserError
from tuner.models.load import load_model
from tuner.models.rope import apply_rope, check_served_length, describe_rope, switch_length, trained_length
from tuner.models.save import save_full, save_model
from tuner.models.segment_rope import SegmentedRotary
from tuner.models.tiny import tiny_model_folder

CPU = torch.device("cpu")
MIXED = Rope(base=5e6, length=65_536, mixed_window=True)


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
        SegmentedRotary(config)(x, positions), LlamaRotaryEmbedding(config)(x, positions), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_segment_does_not_feel_its_neighbours_nor_the_past():
    """transformers' own does: it takes the longest segment's scale for all, and remembers it."""
    config = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    rotary, x = SegmentedRotary(config), torch.zeros(1, 1)
    lengths = (40, 5, 1, 60, 32)
    alone = [rotary(x, torch.arange(length)[None])[0] for length in lengths]
    packed = torch.cat([torch.arange(length) for length in lengths])[None]
    assert torch.equal(rotary(x, packed)[0], torch.cat(alone, dim=1))
    theirs = LlamaRotaryEmbedding(config)
    assert not torch.equal(theirs(x, packed)[0], torch.cat(alone, dim=1))


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn", "mixed"])
@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_rope_is_saved_with_the_model(internlm2_folder, tmp_path, scaling, adapter):
    rope = Rope(base=5e6, scaling=scaling, factor=2.0) if scaling != "mixed" else MIXED
    model = Model(path=str(internlm2_folder), rope=rope)
    loaded = load_model(model, precision="fp32", device=CPU, adapter=adapter)
    save_model(loaded, tmp_path / "model")
    again = load_model(Model(path=str(tmp_path)), precision="fp32", device=CPU)
    without_weights = load_model(Model(path=str(tmp_path)), precision="fp32", device=torch.device("meta"))
    for config in (again.transformer.config, without_weights.transformer.config):
        assert loaded.transformer.config.rope_parameters.items() <= config.rope_parameters.items()
        assert config.rope_parameters["rope_type"] == scaling.replace("mixed", "longrope")
        assert describe_rope(config) == describe_rope(loaded.transformer.config)
    rotary = again.transformer.model.rotary_emb
    assert isinstance(rotary, SegmentedRotary) == (scaling in ("dynamic", "mixed"))


def test_dynamic_scaling_reaches_the_logits(internlm2_folder, tokens):
    """Past the trained length a scaled model differs from an unscaled one, and not before."""
    plain = AutoModelForCausalLM.from_pretrained(internlm2_folder)
    plain.config.max_position_embeddings = 16
    apply_rope(Rope(scaling="dynamic", factor=2.0), plain.config)
    scaled = SegmentedRotary(plain.config)
    unscaled = plain.model.rotary_emb
    positions = torch.arange(24)[None]
    assert torch.equal(scaled(tokens, positions[:, :16])[0], unscaled(tokens, positions[:, :16])[0])
    assert not torch.equal(scaled(tokens.float(), positions)[0], unscaled(tokens.float(), positions)[0])


NEW = [
    Rope(base=5e6, length=128, mixed_window=True),
    Rope(scaling="linear", factor=4.0, mixed_window=True),
    Rope(base=5e4, scaling="yarn", length=128, mixed_window=True),
    Rope(scaling="longrope", factor=4.0, long_factors=(1.0, 1.5, 2, 2, 3, 3, 4, 4), mixed_window=True),
]


@pytest.mark.parametrize("rope", NEW)
@pytest.mark.parametrize("checkpoint", [{}, {"rope_type": "dynamic", "factor": 2.0}])
def test_mixed_window(rope, checkpoint):
    """Segments within the trained length are rotated as by the checkpoint, bit for bit; longer ones as by the new."""
    parameters = {"rope_type": "default", "rope_theta": 1e4} | checkpoint
    mixed, new = llama(rope_parameters=dict(parameters)), llama(rope_parameters=dict(parameters))
    for _ in range(2):  # a saved model has both sets already: asking again changes nothing
        apply_rope(rope, mixed)
        assert (mixed.max_position_embeddings, trained_length(mixed), switch_length(mixed)) == (128, 32, 32)
    apply_rope(rope.model_copy(update={"mixed_window": False}), new)
    assert new.max_position_embeddings == 128
    lengths, x = (40, 5, 32, 33, 100), torch.zeros(1, 1)
    packed = torch.cat([torch.arange(length) for length in lengths])[None]
    parts = SegmentedRotary(mixed)(x, packed)[0].split(lengths, dim=1)
    original, scaled = LlamaRotaryEmbedding(llama()), LlamaRotaryEmbedding(new)
    for length, part in zip(lengths, parts, strict=True):
        positions = torch.arange(length)[None]
        if length <= 32:
            assert torch.equal(part, original(x, positions)[0])
        else:  # but for YaRN's factor on all scores, which short rows must not feel
            torch.testing.assert_close(
                part, scaled(x, positions)[0] / scaled.attention_scaling, atol=2e-5, rtol=0
            )
    assert "of their own for longer rows, to 128 (mixed window)" in describe_rope(mixed)


def test_a_mixed_window_keeps_the_scaling_of_a_checkpoint():
    """Llama 3's own frequencies are of its file, not of its base alone."""
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    config, before = llama(rope_parameters=dict(llama3)), llama(rope_parameters=dict(llama3))
    apply_rope(Rope(base=1e6, length=64, mixed_window=True), config)
    positions, x = torch.arange(16)[None], torch.zeros(1, 1)
    expected = LlamaRotaryEmbedding(before)(x, positions)[0]
    torch.testing.assert_close(SegmentedRotary(config)(x, positions)[0], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (Rope(scaling="yarn", length=32), "trained for 32 tokens already"),
        (Rope(scaling="longrope", factor=2.0, long_factors=(1.0, 2.0)), "2 numbers, and this model has 8"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint(rope, message):
    with pytest.raises(UserError, match=message):
        apply_rope(rope, llama())


def test_vllm_is_refused_rows_of_both_sets():
    config = llama()
    apply_rope(NEW[0], config)
    check_served_length(config, 32)
    with pytest.raises(UserError, match="up to 33 tokens: vLLM would rotate all rows"):
        check_served_length(config, 33)


SAVED = [
    Rope(base=5e6, length=96),
    Rope(scaling="linear", factor=4.0),
    Rope(scaling="dynamic", factor=4.0),
    Rope(scaling="yarn", factor=4.0),
    Rope(scaling="longrope", factor=4.0, long_factors=(1.0, 1.5, 2, 2, 3, 3, 4, 4)),
    Rope(base=5e6, length=96, mixed_window=True),
    Rope(scaling="yarn", factor=4.0, mixed_window=True),
]


@pytest.fixture(scope="module")
def short_llama(tmp_path_factory):
    """A Llama that was trained for 24 tokens."""
    folder = tiny_model_folder("org/llama", tmp_path_factory.mktemp("short") / "model")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 24}))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("rope", SAVED, ids=lambda rope: f"{rope.scaling}-{rope.mixed_window}")
def test_saved_configs_are_read_by_plain_transformers(rope, short_llama, tmp_path):
    """The same logits, row by row, from transformers' own class and rotary positions."""
    loaded = load_model(Model(path=str(short_llama), rope=rope), precision="fp32", device=CPU, train=False)
    save_full(loaded.transformer, tmp_path, "fp32")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(theirs.model.rotary_emb) is LlamaRotaryEmbedding
    loaded.transformer.set_attn_implementation("eager")
    unscaled = LlamaForCausalLM.from_pretrained(short_llama, attn_implementation="eager")
    for length in (20, 60):
        row = torch.arange(10, 10 + length)[None]
        logits = loaded.transformer(row, position_ids=torch.arange(length)[None]).logits
        torch.testing.assert_close(theirs(row).logits, logits, atol=1e-6, rtol=0)
        kept = length == 20 and (rope.mixed_window or rope.scaling == "dynamic")
        assert torch.equal(theirs(row).logits, unscaled(row).logits) == kept
