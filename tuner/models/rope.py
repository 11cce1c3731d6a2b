"""Rotary positions beyond the trained length: set in a configuration, described, checked."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tuner import config
from tuner.errors import UserError

BY_LENGTH = {"dynamic", "longrope"}
"""transformers' names of rotary positions that depend on the length of the row."""


def apply_rope(rope: config.Rope | None, model_config: PreTrainedConfig) -> None:
    """Write `rope` into a checkpoint's configuration, in place; idempotent.

    transformers computes the frequencies: linear (Chen et al., 2023), dynamic NTK, YaRN (Peng et al., 2023), LongRoPE
    (arXiv 2402.13753). Raises UserError when the model has no single set of rotary positions, and for a target that is
    not longer than what it was trained for.
    """
    if rope is None:
        return
    old, trained = _parameters(model_config), trained_length(model_config)
    new = dict(old)
    length = _target_length(rope, trained)
    if rope.base is not None:
        new["rope_theta"] = rope.base
    if rope.scaling is not None:
        assert length is not None  # Rope has scaling with a target
        new = {name: new[name] for name in ("rope_theta", "partial_rotary_factor") if name in new}
        new |= {"rope_type": rope.scaling, "factor": length / trained}
        if rope.scaling in ("yarn", "longrope"):
            new["original_max_position_embeddings"] = trained
        if rope.long_factors is not None:
            factors = _checked_factors(rope.long_factors, model_config)
            new |= {"short_factor": factors, "long_factor": factors}
    if rope.mixed_window:
        assert length is not None
        with torch.device("cpu"):  # also while a model is built on the meta device
            new = _mixed_window(model_config, new, trained, length)
        # by which vLLM serves short rows, unless it is told a longer --max-model-len
        model_config.original_max_position_embeddings = trained
    # dynamic scaling reads max_position_embeddings as the trained length
    if length is not None:
        model_config.max_position_embeddings = trained if rope.scaling == "dynamic" else length
    model_config.rope_parameters = new


def trained_length(model_config: PreTrainedConfig) -> int:
    """Number of tokens the checkpoint was trained for, before any scaling."""
    parameters = _parameters(model_config)
    if parameters.get("original_max_position_embeddings"):
        return int(parameters["original_max_position_embeddings"])
    factor = parameters["factor"] if parameters.get("rope_type") == "linear" else 1
    return round(model_config.max_position_embeddings / factor)


def reach(model_config: PreTrainedConfig) -> int | None:
    """Number of tokens the checkpoint is meant for, scaling included; None where its configuration does not say."""
    longest = getattr(model_config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        return None
    parameters = getattr(model_config, "rope_parameters", None) or {}
    factor = parameters.get("factor")
    if "rope_theta" not in parameters or not factor or parameters.get("rope_type") == "linear":
        return longest
    # what a file says of both need not agree: max_position_embeddings of Qwen's are those without YaRN, Llama's with
    return max(longest, round(trained_length(model_config) * factor))


def describe_rope(model_config: PreTrainedConfig) -> str:
    """One line for `tuner check`: base, scaling, trained length and scaled length."""
    try:
        parameters, length = _parameters(model_config), trained_length(model_config)
    except UserError:
        return "no single set of rotary positions"
    text = f"base {parameters['rope_theta']:,.0f}, trained for {length:,} tokens"
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return text
    factor = parameters.get("factor") or model_config.max_position_embeddings / length
    scaled = f"{kind} scaling × {factor:g} to {round(length * factor):,}"
    if switch_length(model_config) is not None:
        scaled = f"frequencies of their own for longer rows, to {round(length * factor):,} (mixed window)"
    return f"{text}, {scaled}"


def switch_length(model_config: PreTrainedConfig) -> int | None:
    """Longest row that LongRoPE rotates by its short set of frequencies; None for one set for all rows."""
    parameters = getattr(model_config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope" or parameters["short_factor"] == parameters["long_factor"]:
        return None
    return int(parameters["original_max_position_embeddings"])


def check_cached_length(model_config: PreTrainedConfig, length: int) -> None:
    """Raise UserError where keys cached from fewer tokens are wrong for rows of `length` tokens.

    Beyond the trained length, dynamic scaling rotates all keys of a row by its current length: each new token changes
    those before it, which a cache keeps as they were (measured on a tiny InternLM2: 0.06 nats on average, 0.5 at most).
    """
    longest = longest_cached(model_config)
    if longest is None or length <= longest:
        return
    raise UserError(
        f"prompts and answers of up to {length:,} tokens cannot be generated under dynamic NTK scaling, which is exact "
        f"only to the trained {longest:,}: lower the maximum length of prompts or "
        'max_new_tokens, or set model.rope=Rope(scaling="yarn" or "linear", factor=...)'
    )


def longest_cached(model_config: PreTrainedConfig) -> int | None:
    """Most tokens of a row whose keys may be cached; None: as many as it has positions."""
    parameters = getattr(model_config, "rope_parameters", None) or {}
    return model_config.max_position_embeddings if parameters.get("rope_type") == "dynamic" else None


def check_served_length(model_config: PreTrainedConfig, length: int) -> None:
    """Raise UserError where vLLM, serving rows of up to `length` tokens, would rotate short ones by another set.

    It has one set of frequencies for all rows, and takes the long one where its --max-model-len is above the length
    at which they change (vllm 0.32, phi3_long_rope_scaled_rope.py).
    """
    switch = switch_length(model_config)
    if switch is not None and length > switch:
        raise UserError(
            f"prompts and answers of up to {length:,} tokens: vLLM would rotate all rows by the frequencies of long "
            f"ones, and this model has others for rows of at most {switch:,} (model.rope.mixed_window); lower the "
            "maximum length of prompts or max_new_tokens, or write engine=local"
        )


def _target_length(rope: config.Rope, trained: int) -> int | None:
    if rope.factor is not None:
        return round(trained * rope.factor)
    if rope.length is not None and rope.length <= trained and (rope.scaling or rope.mixed_window):
        raise UserError(
            f"model.rope.length={rope.length:,}: this model was trained for {trained:,} tokens already; write a longer "
            "one, or leave rope out"
        )
    return rope.length


def _mixed_window(
    model_config: PreTrainedConfig, new: dict[str, Any], trained: int, length: int
) -> dict[str, Any]:
    """Two sets of frequencies as LongRoPE's parameters: the checkpoint's to its trained length, and beyond the new.

    LongRoPE divides the frequencies of a base by numbers of each set, which can express any others.
    """
    base: float = _parameters(model_config)["rope_theta"]
    short, attention = _frequencies(model_config)
    stretched = copy.deepcopy(model_config)
    stretched.rope_parameters, stretched.max_position_embeddings = new, length
    long, _ = _frequencies(stretched)
    plain = 1 / base ** (torch.arange(0, 2 * len(short), 2).double() / (2 * len(short)))
    shared = {"partial_rotary_factor": new["partial_rotary_factor"]} if "partial_rotary_factor" in new else {}
    return shared | {
        "rope_type": "longrope",
        "rope_theta": base,
        "factor": length / trained,
        "original_max_position_embeddings": trained,
        "short_factor": _ratios(plain, short),
        "long_factor": _ratios(plain, long),
        # short rows are to stay as they were, and transformers has one such factor for both
        "attention_factor": attention,
        # the same for vLLM, which reads these names only
        "short_mscale": attention,
        "long_mscale": attention,
    }


def _ratios(plain: Tensor, frequencies: Tensor) -> list[float]:
    ratios = plain / frequencies.double()
    # frequencies are in fp32: a ratio that is 1 but for their rounding is 1
    return torch.where((ratios - 1).abs() < 1e-6, 1.0, ratios).tolist()


def _frequencies(model_config: PreTrainedConfig) -> tuple[Tensor, float]:
    """Frequencies of short rows, fp32 [rotary size / 2] from the fastest on, and the factor on cosines and sines."""
    parameters = _parameters(model_config)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        size = _rotary_size(model_config)
        return 1 / parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size), 1.0
    return ROPE_INIT_FUNCTIONS[kind](model_config, torch.device("cpu"))


def _checked_factors(factors: tuple[float, ...], model_config: PreTrainedConfig) -> list[float]:
    count = _rotary_size(model_config) // 2
    if len(factors) != count:
        raise UserError(
            f"model.rope.long_factors: {len(factors)} numbers, and this model has {count} rotary frequencies; write "
            "one number for each"
        )
    return list(factors)


def _rotary_size(model_config: PreTrainedConfig) -> int:
    heads = model_config.hidden_size // model_config.num_attention_heads
    size = getattr(model_config, "head_dim", None) or heads
    return int(size * _parameters(model_config).get("partial_rotary_factor", 1.0))


def _parameters(model_config: PreTrainedConfig) -> dict[str, Any]:
    parameters = getattr(model_config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters:
        raise UserError(
            f"model.rope: {model_config.model_type} has no single set of rotary positions; leave rope out"
        )
    return parameters
