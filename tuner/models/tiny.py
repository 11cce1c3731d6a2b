"""A random small model and tokenizer of a family, for `tuner check --tiny` without the real one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tuner.resources import chat_templates_folder, locate

_VOCABULARY = 1024
_CHATML = ("<|im_start|>", "<|im_end|>")
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32_768,
}
_INTERNLM = (
    "internlm2",
    "</s>",
    "<s>",
    (
        "[UNUSED_TOKEN_130]",
        "<|plugin|>",
        "<|interpreter|>",
        "<|action_end|>",
        "<|action_start|>",
        *reversed(_CHATML),
    ),
)
_FAMILIES: dict[str, tuple[str, str, str | None, tuple[str, ...]]] = {
    "internlm2": _INTERNLM,
    "internlm3": _INTERNLM,
    "qwen3": ("qwen", "<|im_end|>", None, ("<|endoftext|>", *_CHATML)),
    "mistral": ("mistral", "</s>", "<s>", ("[INST]", "[/INST]")),
    "llama": (
        "llama3",
        "<|eot_id|>",
        "<|begin_of_text|>",
        (
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|finetune_right_pad_id|>",
            "<|reserved_special_token_0|>",
        ),
    ),
    "gemma": ("gemma", "<eos>", "<bos>", ("<pad>", "<start_of_turn>", "<end_of_turn>")),
    "smollm": ("chatml", "<|im_end|>", "<|im_start|>", ("<|endoftext|>", *_CHATML)),
}
"""Model type or part of a name → chat template, end token, begin token, and other tokens of templates and rewards."""

_TYPES = {"smollm": "llama"}
_LENGTHS = {"llama": 8_192}
"""Family → trained length, where it is not that of the shape: configs scale it to a longer one."""


def tiny_model_folder(model_path: str, destination: Path, *, score: bool = False) -> Path:
    """Write a random model (hidden size 64, 2 layers) with a tokenizer, of the same family as `model_path`.

    The family is that of config.json where the folder exists, else by its name; unknown names get Llama with ChatML
    tokens. score: write a reward model, with a scalar head. Returns `destination`; the same path gives the same
    weights.
    """
    family = _family(model_path)
    tokenizer = _tokenizer(family)
    model_type = _TYPES.get(family, family)
    config = AutoConfig.for_model(model_type, **_SHAPE, vocab_size=len(tokenizer), **_specials(tokenizer))
    config.max_position_embeddings = _LENGTHS.get(family, config.max_position_embeddings)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    if model_type == "internlm2":
        # as in every released checkpoint; the class's default is the original code's
        config.attention_bias = config.bias = False
    # the caller's generators stay where they are
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config.num_labels = 1 if score else config.num_labels  # pyright: ignore[reportAttributeAccessIssue]
        kind = AutoModelForSequenceClassification if score else AutoModelForCausalLM
        kind.from_config(config).save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    return destination


def _family(model_path: str) -> str:
    file = Path(locate(model_path), "config.json")
    names = [model_path.lower()]
    if file.is_file():
        names.insert(0, json.loads(file.read_text(encoding="utf-8")).get("model_type", ""))
    for name in names:
        for family in ("internlm2", "internlm3", "smollm", "mistral", "gemma", "llama"):
            if family in name:
                return family
        if "qwen" in name:
            return "qwen3"
        if "polar" in name:
            return "internlm2"
    return "smollm"


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text is encoded without loss."""
    template, end, begin, others = _FAMILIES[family]
    special = list(dict.fromkeys([token for token in (begin, end, *others) if token]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_english(), trainer)
    # SmolLM's begin token opens every ChatML turn: added here, a conversation would begin with two
    if begin is not None and template != "chatml":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    file = chat_templates_folder() / f"{template}.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        additional_special_tokens=[token for token in special if token not in (begin, end)],
        chat_template=file.read_text(encoding="utf-8") if file.is_file() else None,
    )


def _english() -> Iterator[str]:
    """Python's reference manual, which comes with every installation."""
    from pydoc_data.topics import topics

    return iter(list(topics.values())[:20])


def _specials(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
