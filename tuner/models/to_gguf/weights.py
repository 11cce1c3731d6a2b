"""Weights of a model folder as GGUF tensors, one at a time: a model larger than memory can be written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quant_shape_to_byte_shape, quantize
from safetensors import safe_open
from torch import Tensor

from tuner.errors import UserError
from tuner.models.folder_files import weight_files
from tuner.models.to_gguf.families import Shape, rope_factors

Storage = Literal["fp32", "bf16", "f16", "q8_0"]
"""How matrices are stored; vectors are always in fp32."""
KINDS: dict[Storage, tuple[Kind, LlamaFileType]] = {
    "fp32": (Kind.F32, LlamaFileType.ALL_F32),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_WQKV = re.compile(r"attention\.wqkv\b")
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Weight:
    """One tensor of the GGUF file, not read yet."""

    name: str
    """In the GGUF file."""
    shape: tuple[int, ...]
    kind: Kind
    source: _Source | Values

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored array: that of its bytes where a block of weights is more than a number."""
        return (
            self.shape
            if self.kind in (Kind.F32, Kind.F16)
            else quant_shape_to_byte_shape(self.shape, self.kind)
        )

    @property
    def stored_dtype(self) -> Any:
        return {Kind.F32: np.dtype(np.float32), Kind.F16: np.dtype(np.float16)}.get(
            self.kind, np.dtype(np.uint8)
        )

    def read(self) -> np.ndarray:
        """The array that is stored."""
        values = self.source.read().contiguous().numpy()
        if self.kind == Kind.F16 and not np.isfinite(values.astype(np.float16)).all():
            raise UserError(f"{self.name}: some weights do not fit into fp16; write it in bf16")
        return np.ascontiguousarray(quantize(values, self.kind))


@dataclass(frozen=True)
class _Source:
    """Where a tensor's values come from."""

    model: Shape
    file: Path
    key: str
    """Its name in the file."""
    name: str
    """Its name in transformers' Llama, of which InternLM2's `wqkv` is three."""

    def read(self) -> Tensor:
        """The values as llama.cpp wants them, in fp32."""
        with safe_open(str(self.file), framework="pt") as tensors:
            weight = tensors.get_tensor(self.key).float()
        if self.key != self.name:
            weight = _part_of_wqkv(weight, self.name, self.model)
        return for_llama_cpp(weight, self.name, self.model)


@dataclass(frozen=True)
class Values:
    """Values in memory, in fp32."""

    values: Tensor

    def read(self) -> Tensor:
        return self.values


def for_llama_cpp(weight: Tensor, key: str, model: Shape) -> Tensor:
    """A weight of transformers' layout in llama.cpp's. key: its name, with `q_proj`, `k_proj` or `norm` in it."""
    if model.family.norm_offset and key.endswith("norm.weight"):
        return weight + model.family.norm_offset
    if model.family.permuted and "q_proj" in key:
        return interleaved(weight, model.config.num_attention_heads)
    if model.family.permuted and "k_proj" in key:
        return interleaved(weight, model.kv_heads)
    return weight


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection in the order in which neighbors are rotated together, instead of halves of a head."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def weights_of(model: Shape, storage: Storage) -> list[Weight]:
    """Every tensor of a model's GGUF file, in order. Raises UserError for a weight that llama.cpp has no place for."""
    weights = []
    for source, shape in _sources(model):
        name = gguf_name(source.name, model)
        weights.append(Weight(name, shape, _kind(shape, storage), source))
    if (factors := rope_factors(model)) is not None:
        weights.append(Weight("rope_freqs.weight", (len(factors),), Kind.F32, Values(torch.tensor(factors))))
    return weights


def gguf_name(name: str, model: Shape) -> str:
    """Name in a GGUF file of a weight of transformers. Raises UserError where llama.cpp has no place for it."""
    names = get_tensor_name_map(model.family.arch, model.config.num_hidden_layers)
    if (renamed := names.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
        raise UserError(
            f"{model.folder}: a GGUF file of a {model.config.model_type} model has no place for {name}; serve the "
            "complete model with vLLM or transformers instead"
        )
    return renamed


def _sources(model: Shape) -> Iterator[tuple[_Source, tuple[int, ...]]]:
    """Every weight of a model folder and its shape; InternLM2's `wqkv` as three projections."""
    heads = (model.config.num_attention_heads, model.kv_heads, model.kv_heads)
    for file in weight_files(model.folder):
        with safe_open(str(file), framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                shape = tuple(tensors.get_slice(key).get_shape())
                if _WQKV.search(key):
                    for projection, count in zip(_PROJECTIONS, heads, strict=True):
                        name = _WQKV.sub(projection, key)
                        yield _Source(model, file, key, name), (count * model.head_dim, *shape[1:])
                elif not is_computed(key, model):
                    yield _Source(model, file, key, key), shape


def is_computed(key: str, model: Shape) -> bool:
    """Whether llama.cpp computes a weight itself: a tied head, and the rotary frequencies of early checkpoints."""
    tied = model.config.tie_word_embeddings and key in ("lm_head.weight", "output.weight")
    return tied or key.endswith("rotary_emb.inv_freq")


def _part_of_wqkv(fused: Tensor, name: str, model: Shape) -> Tensor:
    """One projection of InternLM2's `wqkv`: for each key head its group of query heads, the key and the value head."""
    group = model.config.num_attention_heads // model.kv_heads
    heads = fused.view(model.kv_heads, group + 2, model.head_dim, *fused.shape[1:])
    parts = {"q_proj": heads[:, :group], "k_proj": heads[:, group], "v_proj": heads[:, group + 1]}
    return parts[name.split(".")[-2]].reshape(-1, *fused.shape[1:])


def _kind(shape: tuple[int, ...], storage: Storage) -> Kind:
    kind = KINDS[storage][0]
    if len(shape) == 1:
        return Kind.F32
    # rows that are no whole number of blocks stay as llama.cpp's converter leaves them
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16
