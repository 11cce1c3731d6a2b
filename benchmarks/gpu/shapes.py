"""Random models of real shapes, made on the device from a configuration alone: no weights are downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks.gpu.case import Place
from tuner.models.tiny import tiny_model_folder

BYTES_PER_SECOND = 5e8
"""Assumed of making and writing a model: a guess until it is measured."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model."""

    family: str
    """Of the tokenizer, and of the small stand-in of a dry run: a name that `tiny_model_folder` knows."""
    template: str
    """Chat template that the tokenizer has the tokens of."""
    reward_token: str
    """A token of the tokenizer at which a reward model's score is read."""
    model_type: str
    sizes: Mapping[str, Any]
    """Fields of its config.json."""

    @property
    def bytes(self) -> int:
        """Memory of its weights in bf16."""
        return 2 * sum(weight.numel() for weight in _build(self.config(), torch.device("meta")).parameters())

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(self.model_type, **self.sizes)


_INTERNLM2 = {
    "vocab_size": 92_544,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "bias": False,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
}


def _internlm2(hidden: int, inner: int, layers: int, heads: int) -> Shape:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes = {**_INTERNLM2, **sizes, "num_attention_heads": heads}
    return Shape("internlm2", "internlm2", "[UNUSED_TOKEN_130]", "internlm2", sizes)


def _llama(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> Shape:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes = {**_LLAMA3, **sizes, "num_attention_heads": heads, "tie_word_embeddings": tied}
    return Shape("org/llama", "llama3", "<|finetune_right_pad_id|>", "llama", sizes)


SHAPES: dict[str, Shape] = {
    "internlm2_1_8b": _internlm2(2048, 8192, 24, 16),
    "internlm2_7b": _internlm2(4096, 14_336, 32, 32),
    "internlm2_20b": _internlm2(6144, 16_384, 48, 48),
    "llama3_1b": _llama(2048, 8192, 16, 32, tied=True),
    "llama3_8b": _llama(4096, 14_336, 32, 32, tied=False),
    "qwen2_5_7b": Shape(
        "qwen",
        "qwen",
        "<|endoftext|>",
        "qwen2",
        {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_theta": 1_000_000.0,
            "tie_word_embeddings": False,
        },
    ),
}


def model_folder(name: str, place: Place) -> Path:
    """The folder of a random model, made where it is missing; in a dry run that of a small one of the same family.

    Its tokenizer is the small one's, of 1,024 tokens: what tokens a row has changes neither time nor memory.
    """
    shape = SHAPES[name]
    folder = _folder(name, place.models, small=place.is_dry)
    if (folder / "complete").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tiny_model_folder(shape.family, folder)
    if not place.is_dry:
        _make_room(place.models, folder, shape.bytes)
        _write_weights(shape, folder, place.device)
    (folder / "complete").touch()
    return folder


def seconds_to_make(name: str, models: Path) -> float:
    """Estimate of what `model_folder` takes."""
    is_there = (_folder(name, models, small=False) / "complete").is_file()
    return 0.0 if is_there else SHAPES[name].bytes / BYTES_PER_SECOND


def _folder(name: str, models: Path, *, small: bool) -> Path:
    return models / (f"small_{name}" if small else name)


def _write_weights(shape: Shape, folder: Path, device: torch.device) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.manual_seed(0)
    _build(shape.config(), device).save_pretrained(folder, max_shard_size="4GB")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _build(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _make_room(models: Path, kept: Path, needed: int) -> None:
    """Remove other models where the disk has too little room for one more."""
    for other in sorted(models.iterdir()):
        if shutil.disk_usage(models).free > 1.1 * needed:
            return
        if other != kept:
            shutil.rmtree(other, ignore_errors=True)
