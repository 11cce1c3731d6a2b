"""GGUF files, read back by the package `gguf` and by transformers; tests/handover asks llama.cpp itself."""

import json
import shutil

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType
from peft import PeftModel
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.small_models import write_case
from tests.unit.models.test_foreign_adapters import saved
from tuner.config import Model
from tuner.errors import UserError
from tuner.models.locate import locate
from tuner.models.tiny import tiny_model_folder
from tuner.models.to_gguf import k_quants
from tuner.models.to_gguf.chat_format import chat_format
from tuner.models.to_gguf.export import export_gguf, export_lora
from tuner.models.to_gguf.write import write_gguf
from tuner.models.tool_python import PYTHON


def field(reader, name):
    return reader.fields[name].contents()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama with Llama 3's rotary positions and biases: (folder, model)."""
    folder = tmp_path_factory.mktemp("llama")
    return folder, write_case("llama3", folder)


# half a step of the largest weight: of 8 and 11 significant bits; of 1/127 of a block's largest, itself in fp16
ROUNDING = {"fp32": 0, "bf16": 2**-8, "f16": 2**-11, "q8_0": 1 / 254 + 2**-11}


@pytest.mark.parametrize("storage", ROUNDING)
def test_transformers_reads_the_same_weights(llama, tmp_path, storage):
    folder, model = llama
    write_gguf(folder, tmp_path / "model.gguf", name="llama", storage=storage)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).state_dict()
    for name, weight in model.state_dict().items():
        if "bias" not in name:  # transformers leaves them in llama.cpp's order
            difference = float((read[name] - weight).abs().max())
            assert difference <= ROUNDING[storage] * float(weight.abs().max()), name


def test_fields_say_what_the_model_is(llama, tmp_path):
    folder, model = llama
    write_gguf(folder, tmp_path / "model.gguf", name="a name", storage="f16")
    reader, tokenizer = GGUFReader(tmp_path / "model.gguf"), AutoTokenizer.from_pretrained(folder)
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert field(reader, "general.name") == "a name"
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(tokens) == model.get_input_embeddings().weight.shape[0] > len(tokenizer)
    assert set(types[len(tokenizer) :]) == {TokenType.UNUSED}
    assert {tokens[i] for i, kind in enumerate(types) if kind == TokenType.CONTROL} == set(
        tokenizer.all_special_tokens
    )
    # transformers' own factors of the rotary frequencies
    plain = 1 / 1e4 ** (torch.arange(0, 16, 2) / 16)
    (factors,) = (tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    assert np.allclose(factors, plain / model.model.rotary_emb.inv_freq, rtol=1e-6)


def test_a_template_of_ours_has_no_tag_that_jinja_does_not_know(llama, tmp_path):
    write_gguf(llama[0], tmp_path / "model.gguf", name="llama")
    template = field(GGUFReader(tmp_path / "model.gguf"), "tokenizer.chat_template")
    tokenizer = AutoTokenizer.from_pretrained(llama[0])
    assert "generation %}" in tokenizer.chat_template
    assert "generation %}" not in template
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template) == rendered


def test_internlm2_is_a_llama_with_sentencepiece(tmp_path):
    model = write_case("internlm2", tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "out", name="internlm2", dtype="fp32", quantization=None)
    reader, tokenizer = (
        GGUFReader(tmp_path / "out" / "model.gguf"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    assert all(torch.equal(read.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert field(reader, "tokenizer.ggml.model") == "llama"
    assert field(reader, "tokenizer.ggml.add_space_prefix")
    assert field(reader, "tokenizer.ggml.add_bos_token")
    assert field(reader, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    # what ends a chat's turn is another token
    assert field(reader, "tokenizer.ggml.eot_token_id") == tokenizer.convert_tokens_to_ids("<|im_end|>")
    stops = [line for line in (tmp_path / "out" / "Modelfile").read_text().splitlines() if "stop" in line]
    assert stops == ['PARAMETER stop "</s>"', 'PARAMETER stop "<|im_end|>"']


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(tmp_path):
    folder = tiny_model_folder("org/smollm", tmp_path / "model")
    rust = Tokenizer.from_file(str(folder / "tokenizer.json"))
    split = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")
    rust.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    rust.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match=r"reads other tokens than this tokenizer in \d+ of \d+ texts"):
        export_gguf(folder, tmp_path / "out", name="x", dtype="bf16", quantization=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "this one is 'gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "a reward model"),
        ({"hidden_act": "relu"}, "the activation 'relu' is not what llama.cpp computes"),
        ({"quantization_config": {"load_in_8bit": True}}, "stored in int8"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(llama, tmp_path, changes, message):
    values = json.loads((llama[0] / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        write_gguf(tmp_path, tmp_path / "model.gguf", name="x")


def test_k_quants_need_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(PYTHON, str(tmp_path / "python"))
    with pytest.raises(UserError, match="--quantize q4_k_m needs llama-cpp-python: `pip install"):
        k_quants.write_q4_k_m(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("template", "known"),
    [
        (
            "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]",
            True,
        ),
        # Qwen2.5's: a system turn of its own where there is none
        (
            "{% if messages[0].role != 'system' %}[system]You are.\n{% endif %}"
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}",
            True,
        ),
        ("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}", False),
    ],
)
def test_a_chat_format_is_given_only_where_it_renders_the_same(tmp_path, template, known):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder("org/llama", tmp_path / "model"))
    tokenizer.chat_template = template
    measured = chat_format(tokenizer)
    assert (measured is not None) == known
    if measured is not None:
        turns = [("user", "x"), ("assistant", "y"), ("user", "z")]
        messages = [{"role": role, "content": content} for role, content in turns]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert measured.render(turns) == prompt


def test_only_the_files_of_the_weights_are_read(llama, tmp_path):
    """As transformers does: an adapter may have been saved into the folder, or a copy of the weights."""
    folder = shutil.copytree(llama[0], tmp_path / "whole")
    save_file({"base_model.model.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    write_gguf(folder, tmp_path / "whole.gguf", name="llama", storage="fp32")
    llama[1].save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    parts = tmp_path / "parts"
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for file in folder.iterdir():
        if not file.match("*.safetensors"):
            shutil.copy(file, parts)
    shutil.copy(folder / "adapter_model.safetensors", parts)
    write_gguf(parts, tmp_path / "parts.gguf", name="llama", storage="fp32")
    whole, parted = (
        {t.name: t.data for t in GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("whole", "parts")
    )
    assert whole.keys() == parted.keys()
    assert all((whole[name] == parted[name]).all() for name in whole)
    lost = parts / index["weight_map"]["model.norm.weight"]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} is missing; restore the weights"):
        write_gguf(parts, tmp_path / "lost.gguf", name="llama", storage="fp32")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny_model_folder("org/qwen3", tmp_path_factory.mktemp("qwen") / "base")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}])
def test_an_adapter_has_the_scale_that_peft_computes_with(qwen, tmp_path, settings):
    folder = saved(qwen, tmp_path / "peft", target_modules=["q_proj", "v_proj"], **settings)
    export_lora(locate(Model(path=str(folder))), tmp_path / "out", name="adapter")
    base = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    before = base.model.layers[0].self_attn.v_proj.weight.clone()
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    reader = GGUFReader(tmp_path / "out" / "adapter.gguf")
    down, up = (
        next(tensor.data for tensor in reader.tensors if tensor.name == f"blk.0.attn_v.weight.lora_{side}")
        for side in "ab"
    )
    # llama.cpp divides by the tensor's own rank
    change = field(reader, "adapter.lora.alpha") / len(down) * torch.tensor(up @ down)
    torch.testing.assert_close(
        change, merged.model.layers[0].self_attn.v_proj.weight - before, rtol=1e-4, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_pattern": {"q_proj": 64}}, "has an alpha of its own for some layers"),
        ({"rank_pattern": {"q_proj": 2}, "use_rslora": True}, "has rsLoRA's scale with a rank of its own"),
        ({"target_parameters": ["k_proj.weight"]}, "adapts parameters"),
    ],
)
def test_an_adapter_that_one_alpha_cannot_scale_is_refused(qwen, tmp_path, settings, message):
    folder = saved(qwen, tmp_path / "peft", target_modules=["q_proj", "v_proj"], **settings)
    with pytest.raises(UserError, match=f"peft: its adapter {message}.*--format gguf"):
        export_lora(locate(Model(path=str(folder))), tmp_path / "out", name=str(folder))
    assert not (tmp_path / "out").exists()
