"""Rotary positions beyond the trained length: set in a configuration, described, exact in packed rows."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tuner import config
from tuner.errors import UserError

_GROWS = ("linear", "yarn")  # dynamic scaling reads max_position_embeddings as the trained length


def apply_rope(rope: config.Rope | None, model_config: PreTrainedConfig) -> None:
    """Write `rope` into a checkpoint's configuration, in place; idempotent.

    transformers computes the frequencies: linear (Chen et al., 2023), dynamic NTK, YaRN (Peng et al., 2023). Raises
    UserError when the model has no single set of rotary positions.
    """
    if rope is None:
        return
    old = _parameters(model_config)
    new = dict(old)
    if rope.base is not None:
        new["rope_theta"] = rope.base
    if rope.scaling is not None:
        assert rope.factor is not None  # Rope has both or neither
        length = trained_length(model_config)
        unscaled = {name: old[name] for name in ("rope_theta", "partial_rotary_factor") if name in new}
        new = unscaled | {"rope_theta": new["rope_theta"], "rope_type": rope.scaling, "factor": rope.factor}
        if rope.scaling == "yarn":
            new["original_max_position_embeddings"] = length
        model_config.max_position_embeddings = round(length * (rope.factor if rope.scaling in _GROWS else 1))
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
    return f"{text}, {kind} scaling × {factor:g} to {round(length * factor):,}"


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


class SegmentedDynamicRotary(nn.Module):
    """Dynamic NTK scaling by the length of each segment of a packed row.

    transformers' own uses one length for the whole batch and remembers the longest so far: a sample's positions would
    depend on what it is packed with and on earlier batches. Here they depend on the sample alone. A segment starts
    wherever positions do not increase; positions are [batch, tokens].
    """

    inv_freq: Tensor

    def __init__(self, model_config: PreTrainedConfig, device: torch.device | None = None):
        super().__init__()
        self.config = model_config
        self.trained_length = model_config.max_position_embeddings
        inv_freq, self.attention_scaling = ROPE_INIT_FUNCTIONS["dynamic"](model_config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [batch, tokens, head_dim], in x's dtype."""
        # in fp32 whatever x is: bf16 counts whole numbers only to 256
        freqs = position_ids[..., None].float() * self._frequencies(position_ids).to(x.device)
        angles = torch.cat((freqs, freqs), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    def _frequencies(self, position_ids: Tensor) -> Tensor:
        """[head_dim / 2], or [batch, tokens, head_dim / 2] where a segment is longer than the trained length."""
        inv_freq = self.inv_freq.float()
        # waits for the device once a pass; only models with dynamic scaling come here
        if int(position_ids.max()) < self.trained_length:
            return inv_freq
        lengths = _segment_lengths(position_ids)
        frequencies = inv_freq.expand(*position_ids.shape, -1).clone()
        for length in lengths[lengths > self.trained_length].unique():
            stretched, _ = ROPE_INIT_FUNCTIONS["dynamic"](self.config, position_ids.device, seq_len=length)
            frequencies[lengths == length] = stretched
        return frequencies


def install_segmented_rope(model: PreTrainedModel) -> None:
    """Make a model with dynamic scaling exact in packed rows; other models are not changed."""
    parameters = getattr(model.config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "dynamic":
        return
    for module in list(model.modules()):
        rotary = getattr(module, "rotary_emb", None)
        if isinstance(rotary, nn.Module) and getattr(rotary, "rope_type", None) == "dynamic":
            device = rotary.get_buffer("inv_freq").device
            module.rotary_emb = SegmentedDynamicRotary(model.config).to(device)


def _segment_lengths(position_ids: Tensor) -> Tensor:
    """Length of each token's segment, [batch, tokens]: the segment's last position plus one."""
    starts = torch.ones_like(position_ids)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    segment = starts.cumsum(dim=1) - 1
    longest = torch.zeros_like(position_ids).scatter_reduce(1, segment, position_ids + 1, reduce="amax")
    return longest.gather(1, segment)


def _parameters(model_config: PreTrainedConfig) -> dict[str, Any]:
    parameters = getattr(model_config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters:
        raise UserError(
            f"model.rope: {model_config.model_type} has no single set of rotary positions; leave rope out"
        )
    return parameters
