"""Rotary positions that depend on a row's length, exact in packed rows: by the length of each segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tuner.models.rope import BY_LENGTH

_LENGTHS = "segment_lengths"
"""Attribute of the positions of a part of a row: the length of each token's segment, [1, tokens]."""


class SegmentedRotary(nn.Module):
    """Dynamic NTK scaling and LongRoPE by the length of each segment of a packed row.

    transformers' own take one length for the whole batch, and its dynamic scaling remembers the longest so far: a
    sample's positions would depend on what it is packed with and on earlier batches. Here they depend on the sample
    alone. A segment starts wherever positions do not increase; positions are [batch, tokens]. Positions of a part of a
    row come from `part_positions`, which knows how long segments are that go on beyond the part.
    """

    inv_freq: Tensor

    def __init__(self, model_config: PreTrainedConfig, device: torch.device | None = None):
        super().__init__()
        self.config = model_config
        self.kind: str = model_config.rope_parameters["rope_type"]
        self.trained_length: int = model_config.max_position_embeddings
        if self.kind == "longrope":
            self.trained_length = model_config.rope_parameters["original_max_position_embeddings"]
        inv_freq, self.attention_scaling = ROPE_INIT_FUNCTIONS[self.kind](model_config, device)
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
        lengths: Tensor | None = getattr(position_ids, _LENGTHS, None)
        longest = position_ids.max() + 1 if lengths is None else lengths.max()
        # waits for the device once a pass; only models whose positions depend on the length come here
        if int(longest) <= self.trained_length:
            return inv_freq
        if lengths is None:
            lengths = _segment_lengths(position_ids)
        if self.kind == "longrope":  # which has one set of frequencies for all long segments
            lengths = lengths.clamp(max=self.trained_length + 1)
        frequencies = inv_freq.expand(*position_ids.shape, -1).clone()
        for length in lengths[lengths > self.trained_length].unique():
            stretched, _ = ROPE_INIT_FUNCTIONS[self.kind](self.config, position_ids.device, seq_len=length)
            frequencies[lengths == length] = stretched
        return frequencies


def install_segmented_rope(model: PreTrainedModel) -> None:
    """Make a model whose positions depend on the row's length exact in packed rows; others are not changed."""
    kind = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    if kind not in BY_LENGTH:
        return
    for module in list(model.modules()):
        rotary = getattr(module, "rotary_emb", None)
        if isinstance(rotary, nn.Module) and getattr(rotary, "rope_type", None) == kind:
            device = rotary.get_buffer("inv_freq").device
            module.rotary_emb = SegmentedRotary(model.config).to(device)


def part_positions(positions_T: Tensor, first: int, end: int) -> Tensor:
    """The positions of some tokens of a packed row, [1, tokens], by which they are rotated as in the whole row."""
    part = positions_T[None, first:end]
    # on the tensor, which layers hand on as it is: a setting of the module would be another row's in a backward pass
    # that computes positions again
    setattr(part, _LENGTHS, _segment_lengths(positions_T[None])[:, first:end])
    return part


def depends_on_length(model: PreTrainedModel) -> bool:
    """Whether a model's positions depend on the length of a row in a way that is not made exact here."""
    parameters: dict[str, Any] = getattr(model.config, "rope_parameters", None) or {}
    of_layers = [part for part in parameters.values() if isinstance(part, dict)]  # where their kinds differ
    exact = any(isinstance(module, SegmentedRotary) for module in model.modules())
    return bool({part.get("rope_type") for part in (parameters, *of_layers)} & BY_LENGTH) and not exact


def _segment_lengths(position_ids: Tensor) -> Tensor:
    """Length of each token's segment, [batch, tokens]: the segment's last position plus one."""
    starts = torch.ones_like(position_ids)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    segment = starts.cumsum(dim=1) - 1
    longest = torch.zeros_like(position_ids).scatter_reduce(1, segment, position_ids + 1, reduce="amax")
    return longest.gather(1, segment)
