"""InternLM2 against a forward pass written here from its checkpoint's own names, in plain torch."""

import json
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, silu
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import tuner.models  # noqa: F401 (registers InternLM2)
from tests.whole_models import dequantized_weights, full_logits
from tuner.config import Freeze, LoRA, Model
from tuner.models.load import load_model
from tuner.models.save import save_model

CPU = torch.device("cpu")
HEADS, KV_HEADS, HIDDEN, LAYERS, INTERMEDIATE, VOCABULARY, MAX_POSITION = 8, 2, 64, 2, 96, 160, 32
HEAD_DIM, EPS, THETA = HIDDEN // HEADS, 1e-5, 1e6


def checkpoint(bias: bool) -> dict[str, torch.Tensor]:
    """Random weights under InternLM2's names and shapes."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.15

    fused = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    weights = {
        "model.tok_embeddings.weight": weight(VOCABULARY, HIDDEN),
        "model.norm.weight": 1 + weight(HIDDEN),
        "output.weight": weight(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "attention.wqkv.weight": weight(fused, HIDDEN),
            prefix + "attention.wo.weight": weight(HIDDEN, HIDDEN),
            prefix + "feed_forward.w1.weight": weight(INTERMEDIATE, HIDDEN),
            prefix + "feed_forward.w3.weight": weight(INTERMEDIATE, HIDDEN),
            prefix + "feed_forward.w2.weight": weight(HIDDEN, INTERMEDIATE),
            prefix + "attention_norm.weight": 1 + weight(HIDDEN),
            prefix + "ffn_norm.weight": 1 + weight(HIDDEN),
        }
        if bias:
            weights |= {
                prefix + "attention.wqkv.bias": weight(fused),
                prefix + "attention.wo.bias": weight(HIDDEN),
            }
    return weights


def original_config(bias: bool, rope_scaling: dict | None) -> dict:
    """config.json as the released checkpoints have it."""
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": MAX_POSITION,
        "model_type": "internlm2",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "pad_token_id": 2,
        "rms_norm_eps": EPS,
        "rope_scaling": rope_scaling,
        "rope_theta": THETA,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.41.0",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x (tokens, heads, head_dim): pairs (i, i + head_dim / 2) turned by position · theta^(-2i / head_dim)"""
    half = HEAD_DIM // 2
    speeds = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), speeds)[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def reference_logits(
    weights: dict[str, torch.Tensor], tokens: torch.Tensor, factor: float | None
) -> torch.Tensor:
    """Logits (tokens, vocabulary) of one row of tokens, in fp64."""
    weights = {name: weight.double() for name, weight in weights.items()}
    length, group = len(tokens), HEADS // KV_HEADS
    theta = THETA
    if factor is not None and length > MAX_POSITION:
        theta *= (factor * length / MAX_POSITION - (factor - 1)) ** (HEAD_DIM / (HEAD_DIM - 2))
    x = weights["model.tok_embeddings.weight"][tokens]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in range(LAYERS):

        def part(name: str, prefix: str = f"model.layers.{layer}.") -> torch.Tensor | None:
            return weights.get(prefix + name)

        normed = norm(x, part("attention_norm.weight"))
        fused = linear(normed, part("attention.wqkv.weight"), part("attention.wqkv.bias"))
        fused = fused.view(length, KV_HEADS, group + 2, HEAD_DIM)
        query = rotate(fused[:, :, :group].reshape(length, HEADS, HEAD_DIM), theta)
        key = rotate(fused[:, :, group], theta).repeat_interleave(group, dim=1)
        value = fused[:, :, group + 1].repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(HEAD_DIM)
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), value)
        x = x + linear(
            attended.reshape(length, HIDDEN), part("attention.wo.weight"), part("attention.wo.bias")
        )
        normed = norm(x, part("ffn_norm.weight"))
        gated = silu(linear(normed, part("feed_forward.w1.weight"))) * linear(
            normed, part("feed_forward.w3.weight")
        )
        x = x + linear(gated, part("feed_forward.w2.weight"))
    return linear(norm(x, weights["model.norm.weight"]), weights["output.weight"])


def write(folder, *, bias=False, rope_scaling=None, shards=1):
    """A folder as it is downloaded: sharded, with an auto_map to code that is not there, and no tokenizer."""
    folder.mkdir()
    weights = checkpoint(bias)
    (folder / "config.json").write_text(json.dumps(original_config(bias, rope_scaling)))
    names = sorted(weights)
    files = {
        name: f"model-{index * shards // len(names) + 1:05}-of-{shards:05}.safetensors"
        for index, name in enumerate(names)
    }
    for file in set(files.values()):
        part = {name: weights[name] for name in names if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, weights


@pytest.fixture(autouse=True)
def _nobody_at_the_keyboard(monkeypatch):
    """transformers asks on stdin whether a checkpoint's code may run; no test has anyone to answer."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    monkeypatch.setattr(sys, "stdin", None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rope_scaling", [None, {"type": "dynamic", "factor": 2.0}])
@pytest.mark.parametrize("length", [MAX_POSITION - 3, 2 * MAX_POSITION + 5])
@pytest.mark.parametrize("shards", [1, 5])
def test_logits_equal_the_reference(tmp_path, bias, rope_scaling, length, shards):
    folder, weights = write(tmp_path / "model", bias=bias, rope_scaling=rope_scaling, shards=shards)
    tokens = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(weights, tokens, rope_scaling and rope_scaling["factor"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=tokens[None], use_cache=False).logits[0].double()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_dynamic_scaling_matters_past_the_trained_length(tmp_path):
    _, weights = write(tmp_path / "model")
    tokens = torch.randint(0, VOCABULARY, (2 * MAX_POSITION,), generator=torch.Generator().manual_seed(1))
    difference = reference_logits(weights, tokens, None) - reference_logits(weights, tokens, 2.0)
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("bias", [False, True])
def test_our_own_loading_computes_the_same_in_packs(tmp_path, bias):
    from tuner.data.batch import make_batch

    folder, weights = write(tmp_path / "model", bias=bias, rope_scaling={"type": "dynamic", "factor": 2.0})
    model = load_base_of(folder)
    generator = torch.Generator().manual_seed(1)
    lengths = (7, 2 * MAX_POSITION, 1, MAX_POSITION + 9)
    rows = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]
    batch = make_batch([(row.numpy().astype("int32"), torch.ones(len(row)).numpy()) for row in rows])
    with torch.no_grad():
        packed = full_logits(model, batch).double()
    expected = torch.cat([reference_logits(weights, row, 2.0) for row in rows])
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=0)


def load_base_of(folder, **options):
    """A model by our own loader, which wants a tokenizer beside the weights."""
    from tuner.models.load import load_base
    from tuner.models.locate import locate

    location = locate(Model(path=str(folder), **options), "fp32")
    return load_base(location, torch.float32, compute_dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("bias", [False, True])
def test_four_bit_on_load_quantises_the_split_projections(tmp_path, bias):
    """Each of q, k and v is near its rows of wqkv, and biases are kept."""
    folder, weights = write(tmp_path / "model", bias=bias, shards=3)
    model = load_base_of(folder, quantization="nf4")
    group = HEADS // KV_HEADS
    back = dequantized_weights(model)
    assert len(back) == 7 * LAYERS
    for layer in range(LAYERS):
        fused = weights[f"model.layers.{layer}.attention.wqkv.weight"]
        fused = fused.view(KV_HEADS, group + 2, HEAD_DIM, HIDDEN)
        parts = {"q": fused[:, :group], "k": fused[:, group], "v": fused[:, group + 1]}
        for name, part in parts.items():
            exact = part.reshape(-1, HIDDEN)
            error = (back[f"model.layers.{layer}.self_attn.{name}_proj.weight"] - exact).norm() / exact.norm()
            assert 0.01 < error < 0.15
    if bias:
        key = weights["model.layers.0.attention.wqkv.bias"].view(KV_HEADS, group + 2, HEAD_DIM)[:, group]
        assert torch.equal(model.model.layers[0].self_attn.k_proj.bias, key.reshape(-1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shards", [1, 5])
def test_saving_gives_back_the_same_bits(tmp_path, bias, shards):
    folder, weights = write(tmp_path / "model", bias=bias, shards=shards)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    saved = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        saved |= load_file(file)
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(saved[name], weight), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rope_scaling", [None, {"type": "dynamic", "factor": 2.0}])
def test_the_original_code_reads_the_saved_config(tmp_path, bias, rope_scaling):
    """Field by field what its configuration class takes, whose defaults are none of the released values."""
    folder, _ = write(tmp_path / "model", bias=bias, rope_scaling=rope_scaling)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    original, saved = (
        json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "saved")
    )
    for name in original.keys() - {"auto_map", "transformers_version"}:
        assert saved[name] == original[name], name
    assert saved.keys() == original.keys()
    # Code beside the weights is not copied, so the map names the repository that has it.
    for name, target in saved["auto_map"].items():
        assert target == f"internlm/internlm2-7b--{original['auto_map'][name]}"
    if rope_scaling is not None:
        assert saved["rope_scaling"].keys() == {"type", "factor"}  # the original code refuses any other
        assert isinstance(saved["rope_scaling"]["factor"], float)


def test_a_config_without_bias_and_theta_has_the_original_codes_defaults(tmp_path):
    folder, _ = write(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({name: values[name] for name in values.keys() - {"bias", "rope_theta", "rope_scaling"}})
    )
    config = AutoConfig.from_pretrained(folder)
    assert config.attention_bias is True
    assert config.rope_parameters["rope_theta"] == 10_000.0


def test_the_decoder_alone_loads(tmp_path):
    folder, weights = write(tmp_path / "model")
    model = AutoModel.from_pretrained(folder)
    assert torch.equal(model.embed_tokens.weight, weights["model.tok_embeddings.weight"])


def test_code_in_the_folder_is_never_run(tmp_path):
    folder, _ = write(tmp_path / "model")
    for name in ("configuration_internlm2", "modeling_internlm2"):
        (folder / f"{name}.py").write_text("raise SystemExit('ran')")
    for trust in (None, False, True):  # trusting changes nothing where it is not needed
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)])
def test_a_trained_run_keeps_the_layout(tmp_path, internlm2_tokenizer, adapter, monkeypatch):
    monkeypatch.setitem(globals(), "VOCABULARY", 1_024)  # the tokenizer's
    folder, weights = write(tmp_path / "model", bias=True)
    for file in internlm2_tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    freeze = None if adapter else Freeze(all_but_last_layers=1)
    loaded = load_model(Model(path=str(folder)), precision="bf16", device=CPU, adapter=adapter, freeze=freeze)
    save_model(loaded, tmp_path / "run" / "model")
    if adapter is None:
        saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
        assert saved.keys() == weights.keys()
        assert all(torch.equal(saved[name], weights[name].bfloat16()) for name in weights)
        values = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
        assert values["torch_dtype"] == "bfloat16"
    load_model(Model(path=str(tmp_path / "run")), precision="bf16", device=CPU)


@pytest.fixture(scope="module")
def internlm2_tokenizer(tmp_path_factory):
    from tuner.models.tiny import tiny_model_folder

    return tiny_model_folder("internlm2", tmp_path_factory.mktemp("tokenizer"))
