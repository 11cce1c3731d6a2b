"""Random models of a few thousand weights, one of each family that a GGUF file is written of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tuner.models.load  # noqa: F401 (registers InternLM2)
from tuner.models.tiny import tiny_model_folder

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
GEMMA = {
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# the first word is the family of the tokenizer; "sentencepiece" is one of InternLM2's form
UNUSED_TOKENS = [f"[UNUSED_TOKEN_{number}]" for number in range(130, 147)]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3": ("llama", "llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("smollm", "llama", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "llama-linear": ("sentencepiece", "llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", "mistral", {"sliding_window": None}),
    "internlm2": ("sentencepiece", "internlm2", {"bias": False, "rms_norm_eps": 1e-5}),
    "internlm3": ("sentencepiece", "internlm3", {"bias": False, "qkv_bias": False}),
    "qwen2": ("qwen3", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {}),
    "gemma": ("gemma", "gemma", {}),
    "gemma2": ("gemma", "gemma2", GEMMA),
    "gemma3": ("gemma", "gemma3_text", GEMMA | {"rope_parameters": GEMMA3_ROPE}),
}


def write_case(name: str, folder: Path) -> PreTrainedModel:
    """Write the model of a case with its tokenizer into a folder, its embedding larger than the tokenizer."""
    tokens, model_type, changes = CASES[name]
    if tokens == "sentencepiece":
        write_sentencepiece(folder)
    else:
        tiny_model_folder(f"org/{tokens}", folder)
        (folder / "model.safetensors").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {kind: getattr(tokenizer, kind) for kind in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(model_type, **SHAPE | ids | {"vocab_size": len(tokenizer) + 7} | changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for weight in model.parameters():
            # as drawn by transformers, attention would hardly depend on positions
            weight.add_(torch.randn_like(weight), alpha=0.2)
        model.save_pretrained(folder)
    return model


def train_sentencepiece(folder: Path, **settings: Any) -> None:
    """Write `tokenizer.model` of 600 pieces into a folder. settings: further ones of sentencepiece's trainer."""
    from pydoc_data.topics import topics

    text = folder / "text.txt"
    text.write_text("\n".join(list(topics.values())[:10]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **settings,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()


def write_sentencepiece(folder: Path) -> None:
    """A tokenizer of InternLM2's form: sentencepiece with a space before every text, and ChatML's tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    train_sentencepiece(folder, user_defined_symbols=UNUSED_TOKENS)
    AutoConfig.for_model("internlm2").save_pretrained(folder)
    template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer.save_pretrained(folder)
