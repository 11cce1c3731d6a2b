"""InternLM2 (arXiv 2403.17297) as transformers' Llama; its checkpoints are read and written in their own layout.

InternLM2 is Llama with other parameter names, and queries, keys and values fused in one `wqkv`. The weights are
converted while a checkpoint is read, and back while it is written, so that none of the checkpoint's code is run and
tools for InternLM2 can read what is saved here.
"""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

MODEL_TYPE = "internlm2"
ORIGINAL_CODE = "internlm/internlm2-7b"
"""Hub repository with the code that `auto_map` names in a saved config.json, for tools that run it."""
ORIGINAL_REWARD_CODE = "internlm/internlm2-7b-reward"

_LLAMA_ONLY = (
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "pretraining_tp",
    "head_dim",
    "rope_parameters",
)
# transformers leaves out defaults, which differ by release and from those of the original code
_ALWAYS_WRITTEN = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache")


@strict
class InternLM2Config(LlamaConfig):
    """Configuration of InternLM2, read from and written to its original config.json.

    `bias`, `rope_theta` and `rope_scaling` (null or {"type": "dynamic", "factor": 2.0}) are the file's names; where
    one is missing the original code's default applies, which no released checkpoint uses.
    """

    model_type = MODEL_TYPE
    default_theta = 10_000.0

    vocab_size: int = 103168
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    bias: bool = True
    reward_token_id: int | None = None
    """Of reward models: id of the token that ends every conversation, at which the score is read."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.attention_bias = self.bias
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The values under the names that the original code reads."""
        values = super().to_dict()
        rope = values.get("rope_parameters") or {}
        is_reward = InternLM2ForRewardModel.__name__ in (self.architectures or ())
        values = {name: value for name, value in values.items() if name not in _LLAMA_ONLY}
        # where these are missing the original code silently assumes bias=True and theta=10000
        values["bias"] = self.attention_bias
        values["rope_theta"] = rope.get("rope_theta", self.default_theta)
        values["rope_scaling"] = _original_rope_scaling(rope)
        values["attn_implementation"] = "eager"
        values["auto_map"] = _reward_auto_map() if is_reward else _auto_map()
        if not is_reward:
            values.pop("reward_token_id", None)
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """The values written to config.json, with those for which the original code has other defaults."""
        values = super().to_diff_dict()
        values |= {name: getattr(self, name) for name in _ALWAYS_WRITTEN}
        if "dtype" in values:
            values["torch_dtype"] = values.pop("dtype")  # its name before transformers 4.56, and still read
        return values


class InternLM2Model(LlamaModel):
    """The decoder of InternLM2."""

    config_class = InternLM2Config


class InternLM2ForCausalLM(LlamaForCausalLM):
    """InternLM2 with its language head (`output` in the checkpoint)."""

    config_class = InternLM2Config
    # early checkpoints hold the rotary frequencies, which are computed here
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]


class InternLM2ForRewardModel(LlamaForSequenceClassification):
    """InternLM2 with a scalar head (`v_head` in the checkpoint), like the published InternLM2 reward models.

    Its own forward pass reads the score at the last token that is not padding, where the published chat template puts
    the reward token.
    """

    config_class = InternLM2Config
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]

    def __init__(self, config: InternLM2Config) -> None:
        config.num_labels = 1  # missing in the published configurations
        super().__init__(config)


class SplitWqkv(ConversionOps):
    """Splits `wqkv` into query, key and value projections; exact, as rows are only moved.

    wqkv: [kv_heads * (group + 2) * head_dim, ...]; for each key head its group of query heads, then the key head, then
    the value head. Rotary positions are rotate-half in both layouts.
    """

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        fused = _only(next(iter(input_dict.values())))
        group, head_dim = _group(kwargs["config"])
        heads = fused.view(-1, group + 2, head_dim, *fused.shape[1:])
        parts = (heads[:, :group], heads[:, group], heads[:, group + 1])
        return {
            target: part.reshape(-1, *fused.shape[1:])
            for target, part in zip(target_patterns, parts, strict=True)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseWqkv()


class FuseWqkv(ConversionOps):
    """The inverse of SplitWqkv."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        query, key, value = (_only(input_dict[pattern]) for pattern in source_patterns)
        group, head_dim = _group(kwargs["config"])
        rest = query.shape[1:]
        heads = (
            query.view(-1, group, head_dim, *rest),
            key.view(-1, 1, head_dim, *rest),
            value.view(-1, 1, head_dim, *rest),
        )
        return {target_patterns[0]: torch.cat(heads, dim=1).reshape(-1, *rest)}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitWqkv()


def register() -> None:
    """Register InternLM2 with transformers' Auto classes; idempotent."""
    # checkpoints name code of their own in `auto_map`: for a type that is not registered, from_pretrained
    # would ask on stdin whether to run it
    AutoConfig.register(MODEL_TYPE, InternLM2Config, exist_ok=True)
    AutoModel.register(InternLM2Config, InternLM2Model, exist_ok=True)
    AutoModelForCausalLM.register(InternLM2Config, InternLM2ForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(InternLM2Config, InternLM2ForRewardModel, exist_ok=True)
    register_checkpoint_conversion_mapping(MODEL_TYPE, _conversions(), overwrite=True)
    # transformers looks a mapping up by class name first, then by model type: only the reward model's head
    # is v_head
    reward = [WeightRenaming(r"^v_head\.", "score."), *_conversions()]
    register_checkpoint_conversion_mapping(InternLM2ForRewardModel.__name__, reward, overwrite=True)


def _conversions() -> list[WeightRenaming | WeightConverter]:
    projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    return [
        WeightRenaming("tok_embeddings", "embed_tokens"),
        WeightRenaming(r"^output\.", "lm_head."),
        WeightRenaming("attention.wo", "self_attn.o_proj"),
        WeightRenaming("feed_forward.w1", "mlp.gate_proj"),
        WeightRenaming("feed_forward.w3", "mlp.up_proj"),
        WeightRenaming("feed_forward.w2", "mlp.down_proj"),
        WeightRenaming("attention_norm", "input_layernorm"),
        WeightRenaming("ffn_norm", "post_attention_layernorm"),
        # not `key_mapping=`, which only renames: q, k and v would stay random, with no error but a report
        WeightConverter("attention.wqkv", projections, operations=[SplitWqkv()]),
    ]


def _only(tensors: Tensor | list[Tensor]) -> Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


def _group(config: InternLM2Config) -> tuple[int, int]:
    """Query heads per key head, and the head size."""
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    return config.num_attention_heads // config.num_key_value_heads, config.head_dim


def _original_rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    scaling = {"type": kind, "factor": float(rope["factor"])}
    if kind in ("linear", "dynamic"):
        return scaling  # the original code refuses other keys
    rest = {
        name: value
        for name, value in rope.items()
        if name not in ("rope_type", "rope_theta", "factor", "type")
    }
    return scaling | rest


def _reward_auto_map() -> dict[str, str]:
    return {
        "AutoConfig": f"{ORIGINAL_REWARD_CODE}--configuration_internlm2.InternLM2Config",
        "AutoModel": f"{ORIGINAL_REWARD_CODE}--modeling_internlm2.InternLM2ForRewardModel",
    }


def _auto_map() -> dict[str, str]:
    return {
        "AutoConfig": f"{ORIGINAL_CODE}--configuration_internlm2.InternLM2Config",
        "AutoModel": f"{ORIGINAL_CODE}--modeling_internlm2.InternLM2ForCausalLM",
        "AutoModelForCausalLM": f"{ORIGINAL_CODE}--modeling_internlm2.InternLM2ForCausalLM",
    }
