"""Model families that GGUF files are written for: llama.cpp's architecture of each, and its fields.

Fields and weights follow llama.cpp's own converter (conversion/*.py) and loader (src/models/*.cpp).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType

from tuner.errors import UserError
from tuner.models.model_file import FILE, read_model_file, read_transformers_config


@dataclass(frozen=True)
class Family:
    """How the models of a family are written."""

    arch: MODEL_ARCH
    permuted: bool = False
    """Whether llama.cpp rotates neighboring dimensions of queries and keys, where the family rotates halves."""
    norm_offset: float = 0.0
    """Added to the weights of norms: Gemma's norms multiply by 1 + weight."""
    activation: str = "silu"
    tied: bool = False
    """Whether llama.cpp always takes the embedding as the language head."""


_LLAMA = Family(MODEL_ARCH.LLAMA, permuted=True)
_GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    # Llama with other names of weights: as such, tools that do not know InternLM2 load it, too
    "internlm2": _LLAMA,
    "internlm3": _LLAMA,
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "gemma": Family(MODEL_ARCH.GEMMA, norm_offset=1.0, activation=_GELU, tied=True),
    "gemma2": Family(MODEL_ARCH.GEMMA2, norm_offset=1.0, activation=_GELU, tied=True),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, norm_offset=1.0, activation=_GELU),
}
"""Family by `model_type` in config.json."""
_WIDE_SCALE = {MODEL_ARCH.GEMMA2: 46, MODEL_ARCH.GEMMA3: 62}
"""Number of layers of the 27B models, whose attention llama.cpp scales by another size."""


@dataclass(frozen=True)
class Shape:
    """A model's configuration, read from config.json without its weights."""

    folder: Path
    family: Family
    config: Any
    """transformers' configuration."""

    @property
    def head_dim(self) -> int:
        return (
            getattr(self.config, "head_dim", None)
            or self.config.hidden_size // self.config.num_attention_heads
        )

    @property
    def kv_heads(self) -> int:
        return self.config.num_key_value_heads or self.config.num_attention_heads

    @property
    def rope(self) -> dict[str, Any]:
        """Settings of the rotary positions; Gemma 3's of the layers that see the whole context."""
        values: dict[str, Any] = self.config.rope_parameters or {}
        return values.get("full_attention", values)

    @property
    def context_length(self) -> int:
        """Tokens of context within which llama.cpp computes what the model does: it has no window for some families,
        and no dynamic scaling of rotary positions."""
        longest = self.config.max_position_embeddings
        if self.family.arch not in _WIDE_SCALE and _has_window(self.config):
            longest = min(longest, self.config.sliding_window)
        return longest


def read_shape(folder: Path) -> Shape:
    """The configuration of a model folder. Raises UserError where llama.cpp would compute something else, or no GGUF
    file is written of its family."""
    model_type = read_model_file(folder).model_type
    if model_type not in FAMILIES:
        raise UserError(
            f"{folder}: a GGUF file is written of {', '.join(FAMILIES)} models, and this one is {model_type!r}; "
            "convert the complete model with llama.cpp's convert_hf_to_gguf.py"
        )
    config = read_transformers_config(folder, trust_remote_code=False)
    shape = Shape(folder, FAMILIES[model_type], config)
    _check(shape)
    return shape


def write_shape(writer: GGUFWriter, shape: Shape) -> None:
    """Write the fields of a model's configuration."""
    config = shape.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _write_rope(writer, shape)
    if shape.family.arch in _WIDE_SCALE and _has_window(config):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    for name in ("attn", "final"):
        if cap := getattr(config, f"{name}_logit_softcapping", None):
            getattr(writer, f"add_{name}_logit_softcapping")(cap)


def rope_factors(shape: Shape) -> list[float] | None:
    """What the wavelength of each pair of dimensions is multiplied by, [head_dim / 2], for Llama 3's scaling.

    Source: transformers' `_compute_llama3_parameters`; llama.cpp reads the factors as a tensor.
    """
    rope = shape.rope
    if rope.get("rope_type") != "llama3":
        return None
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for dimension in range(0, shape.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (dimension / shape.head_dim)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _write_rope(writer: GGUFWriter, shape: Shape) -> None:
    rope = shape.rope
    writer.add_rope_freq_base(rope["rope_theta"])
    local: dict[str, Any] = (shape.config.rope_parameters or {}).get("sliding_attention") or {}
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or shape.config.max_position_embeddings
        )
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _has_window(config: Any) -> bool:
    """Whether some layers see only the last `sliding_window` tokens."""
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def _check(shape: Shape) -> None:
    """UserError where llama.cpp computes something that config.json does not say."""
    config, family = shape.config, shape.family
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    scale, width = getattr(config, "query_pre_attn_scalar", None), shape.head_dim
    if config.num_hidden_layers == _WIDE_SCALE.get(family.arch):
        width = config.hidden_size // config.num_attention_heads
    differences = {
        f"the activation {activation!r}": activation != family.activation,
        f"rope_type={shape.rope.get('rope_type')!r}": shape.rope.get("rope_type", "default")
        not in ("default", "linear", "yarn", "llama3", "dynamic"),
        "a factor of its own for yarn's attention": shape.rope.get("rope_type") == "yarn"
        and any(shape.rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim")),
        f"query_pre_attn_scalar={scale}": scale is not None and scale != width,
        "a language head of its own": family.tied and not config.tie_word_embeddings,
        "heads of another size than hidden_size / num_attention_heads": family.arch == MODEL_ARCH.QWEN2
        and shape.head_dim * config.num_attention_heads != config.hidden_size,
    }
    for difference, differs in differences.items():
        if differs:
            raise UserError(
                f"{shape.folder / FILE}: {difference} is not what llama.cpp computes for {config.model_type} models; "
                "serve the complete model with vLLM or transformers instead"
            )
