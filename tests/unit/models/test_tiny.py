"""A tiny stand-in is of the family it stands in for."""

import pytest
import torch
from safetensors.torch import load_file

from tuner.config import LoRA, Model
from tuner.models.load import load_model
from tuner.models.tiny import tiny_model_folder


@pytest.mark.parametrize(
    ("path", "kind", "special"),
    [
        ("internlm/internlm2-chat-20b", "InternLM2ForCausalLM", ["<|im_start|>", "<|plugin|>"]),
        ("Qwen/Qwen3-8B", "Qwen3ForCausalLM", ["<|im_start|>", "<|im_end|>"]),
        ("mistralai/Mistral-7B-v0.3", "MistralForCausalLM", ["[INST]", "[/INST]"]),
        ("meta-llama/Llama-3.1-8B", "LlamaForCausalLM", ["<|start_header_id|>", "<|eot_id|>"]),
        ("HuggingFaceTB/SmolLM2-135M", "LlamaForCausalLM", ["<|im_start|>", "<|im_end|>"]),
        ("google/gemma-2b", "GemmaForCausalLM", ["<start_of_turn>", "<end_of_turn>"]),
        ("someone/something", "LlamaForCausalLM", ["<|im_start|>"]),
    ],
)
def test_families(tmp_path, path, kind, special):
    folder = tiny_model_folder(path, tmp_path / "tiny")
    loaded = load_model(
        Model(path=str(folder), quantization="nf4"),
        precision="fp32",
        device=torch.device("cpu"),
        adapter=LoRA(r=2),
    )
    tokenizer = loaded.tokenizer
    assert type(loaded.transformer).__name__ == kind
    assert loaded.transformer.config.vocab_size == len(tokenizer)
    for token in special:
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [
            tokenizer.convert_tokens_to_ids(token)
        ]
    text = "any text, 请, \U0001f600\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_folder_at_hand_tells_its_family(tmp_path, internlm2_folder):
    folder = tiny_model_folder(str(internlm2_folder), tmp_path / "tiny")
    assert "model.layers.0.attention.wqkv.weight" in load_file(folder / "model.safetensors")


def test_the_same_twice(tmp_path):
    first, second = (tiny_model_folder("qwen3", tmp_path / name) for name in ("first", "second"))
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
