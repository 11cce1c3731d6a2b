"""Keys and values of rows that are generated together, behind transformers' cache interface.

Shapes: B rows, K key/value heads, S slots for tokens, D head size, T tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from tuner.errors import UserError

BLOCK = 64
"""Slots for new tokens at first. They double when all are taken, so that the cache is seldom copied."""
MOST_ROWS = 256
"""Maximum rows of a chunk, whatever the cache could hold: each also takes its probabilities in float64."""
_ATTENTION = {"full_attention", "sliding_attention"}


def chunks(lengths: Sequence[int], max_new_tokens: int, cached_tokens: int) -> Iterator[np.ndarray]:
    """Indices of the prompts generated together, longest first, int64; a function of the arguments alone.

    rows × (longest prompt + max_new_tokens) is at most `cached_tokens`, but a chunk has at least one row.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    start = 0
    while start < len(order):
        rows = cached_tokens // (lengths[order[start]] + max_new_tokens)
        end = start + min(max(rows, 1), MOST_ROWS)
        yield order[start:end]
        start = end


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers: 131,072 for InternLM2-7B in bf16."""
    kind = model.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return numbers_per_token(model.config) * dtype.itemsize


def numbers_per_token(shape: PreTrainedConfig) -> int:
    """Number of key and value elements of one token in all layers."""
    config = shape.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size


@dataclass
class _Slots:
    """The slots that all layers write to."""

    rows: int
    capacity: int
    filled: int = 0
    packed: tuple[Tensor, Tensor] | None = None
    """During prefill: row and slot of each token of the packed row, int64 [T]."""


class _RowLayer(DynamicLayer):
    """Keys and values [B, K, S, D] of one layer, with free slots for new tokens."""

    keys: Tensor
    values: Tensor

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self._slots = slots

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens; returns what attention reads: the packed row itself, or all slots filled so far."""
        slots = self._slots
        key_states = key_states.to(value_states.dtype)  # rotary embeddings are fp32 under autocast
        if not self.is_initialized:
            self.keys, self.values = (
                # zeros: a masked slot has weight 0, and 0 times NaN would be NaN
                part.new_zeros(slots.rows, part.shape[1], slots.capacity, part.shape[3])
                for part in (key_states, value_states)
            )
            self.dtype, self.device, self.is_initialized = value_states.dtype, value_states.device, True
        if slots.packed is not None:
            row_T, slot_T = slots.packed
            # indices on both sides of a slice put their dimension first: the target is [T, K, D]
            self.keys[row_T, :, slot_T] = key_states[0].transpose(0, 1)
            self.values[row_T, :, slot_T] = value_states[0].transpose(0, 1)
            return key_states, value_states
        self.keys[:, :, slots.filled] = key_states[:, :, 0]
        self.values[:, :, slots.filled] = value_states[:, :, 0]
        end = slots.filled + 1
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Slots filled before this pass."""
        return self._slots.filled

    def keep(self, rows_B: Tensor, first: int, end: int, capacity: int) -> None:
        """Move the slots `first` to `end` of some rows into new memory with `capacity` slots."""
        if self.is_initialized:
            self.keys = _moved(self.keys, rows_B, first, end, capacity)
            self.values = _moved(self.values, rows_B, first, end, capacity)

    def join(self, other: _RowLayer, end: int, capacity: int) -> None:
        """Put another layer's rows behind these, the last token of every row in slot `end` - 1."""
        if self.is_initialized:  # else it shares the keys of another layer
            filled = self._slots.filled, other._slots.filled
            self.keys = _joined((self.keys, other.keys), filled, end, capacity)
            self.values = _joined((self.values, other.values), filled, end, capacity)


class RowCache(Cache):
    """A left-padded cache: all rows write their next token to the same slot, and shorter prompts start in a later one.

    Layers with a sliding window hold all tokens too, and the mask narrows what they see. Layers that share the keys of
    another layer have none of their own. Raises UserError for a model with layers other than attention.
    """

    def __init__(self, model: PreTrainedModel, lengths: Sequence[int], max_new_tokens: int) -> None:
        config = model.config.get_text_config(decoder=True)
        _refuse_other_layers(config)
        self._lengths, self._device = np.asarray(lengths), model.device
        self._longest, self._max_new_tokens = max(lengths), max_new_tokens
        self._padding = self._longest - self._lengths
        self._slots = _Slots(len(lengths), self._longest + min(BLOCK, max_new_tokens))
        self._has_windows = _has_windows(config)
        self._real_BS = self._real()
        super().__init__(layers=[_RowLayer(self._slots) for _ in range(config.num_hidden_layers)])

    @property
    def is_full(self) -> bool:
        """Whether there is no slot for the next token."""
        return self._slots.filled == self._slots.capacity

    @property
    def mask(self) -> Tensor:
        """Slots that the next token attends to, itself included: bool [B, 1, 1, S]; [B, S] for models with sliding
        windows, which transformers adds."""
        real_BS = self._real_BS[:, : self._slots.filled + 1]
        # bool and 4-D is right under sdpa only: with eager attention it is silently wrong
        return real_BS if self._has_windows else real_BS[:, None, None]

    def prefill(self, rows: range) -> None:
        """The next pass writes the prompts of these rows, packed end to end; call `start_decoding` after the last."""
        self._pack(np.arange(rows.start, rows.stop), self._lengths[rows.start : rows.stop])

    @contextmanager
    def rewritten(self, rows: np.ndarray) -> Iterator[None]:
        """The pass inside writes some rows (int64) anew, packed end to end: all their tokens, the next one included."""
        self._pack(rows, self._slots.filled + 1 - self._padding[rows])
        try:
            yield
        finally:
            self._slots.packed = None

    def _pack(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        starts, row_T = self._padding[rows], np.repeat(rows, lengths)
        slot_T = np.concatenate(
            [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        )
        row_T, slot_T = (torch.from_numpy(part).to(self._device) for part in (row_T, slot_T))
        self._slots.packed = row_T, slot_T

    def start_decoding(self) -> None:
        """Call once all prompts are written: from then on a pass writes one token of every row."""
        self._slots.packed, self._slots.filled = None, self._longest

    def advance(self) -> None:
        """Count the token of every row that the last pass has written."""
        self._slots.filled += 1

    def keep(self, rows: np.ndarray) -> Tensor:
        """Keep only some rows (int64), drop slots that none of them needs, and add free ones; returns the rows on the
        device."""
        rows_B = torch.from_numpy(rows).to(self._device)
        self._lengths, self._padding = (part[rows] for part in (self._lengths, self._padding))
        first, end = int(self._padding.min()), self._slots.filled
        written = end - self._longest
        self._padding, self._longest = self._padding - first, self._longest - first
        room = min(self._max_new_tokens, max(BLOCK, 2 * written))
        capacity = self._longest + room
        for layer in self.layers:
            assert isinstance(layer, _RowLayer)
            layer.keep(rows_B, first, end, capacity)
        self._slots.rows, self._slots.filled, self._slots.capacity = len(rows_B), end - first, capacity
        self._real_BS = self._real()
        return rows_B

    def join(self, other: RowCache) -> None:
        """Put another cache's rows behind these. Both decode; the other is not used any more."""
        end = max(self._slots.filled, other._slots.filled)
        capacity = end + BLOCK
        for layer, joining in zip(self.layers, other.layers, strict=True):
            assert isinstance(layer, _RowLayer)
            assert isinstance(joining, _RowLayer)
            layer.join(joining, end, capacity)
        parts = (self, other)
        self._padding = np.concatenate([part._padding + end - part._slots.filled for part in parts])
        self._lengths = np.concatenate([part._lengths for part in parts])
        self._longest, self._max_new_tokens = end, max(part._max_new_tokens for part in parts)
        self._slots.rows, self._slots.filled, self._slots.capacity = len(self._lengths), end, capacity
        self._real_BS = self._real()

    def _real(self) -> Tensor:
        """Slots that are not left padding, bool [B, S]."""
        padding_B1 = torch.from_numpy(self._padding).to(self._device)[:, None]
        return torch.arange(self._slots.capacity, device=self._device) >= padding_B1


def _moved(cached_BKSD: Tensor, rows_B: Tensor, first: int, end: int, capacity: int) -> Tensor:
    _, heads, _, size = cached_BKSD.shape
    moved = cached_BKSD.new_zeros(len(rows_B), heads, capacity, size)
    moved[:, :, : end - first] = cached_BKSD[:, :, first:end].index_select(0, rows_B.to(cached_BKSD.device))
    return moved


def _joined(parts: Sequence[Tensor], filled: Sequence[int], end: int, capacity: int) -> Tensor:
    """Rows [B, K, S, D] of both parts, aligned at their last filled slots."""
    (_, heads, _, size), rows = parts[0].shape, sum(len(part) for part in parts)
    joined = parts[0].new_zeros(rows, heads, capacity, size)
    row = 0
    for part, count in zip(parts, filled, strict=True):
        joined[row : row + len(part), :, end - count : end] = part[:, :, :count]
        row += len(part)
    return joined


def _has_windows(config: PreTrainedConfig) -> bool:
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None and (
        kinds is None or "sliding_attention" in kinds
    )


def _refuse_other_layers(config: PreTrainedConfig) -> None:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
    if others:
        raise UserError(
            f"model.path: {config.model_type} has layers of the kind {others[0]!r}, which cache other things than keys "
            "and values of tokens, so it cannot generate here; choose a model that has attention alone"
        )
