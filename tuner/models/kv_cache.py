"""Keys and values of rows that are generated together, behind transformers' cache interface.

Shapes: B rows, L of them, K key/value heads, S slots for tokens, D head size, T tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from tuner.errors import UserError

MOST_ROWS = 256
"""Most rows together, whatever the cache could hold: each also takes its probabilities."""
_ATTENTION = {"full_attention", "sliding_attention"}


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
    """What all layers share: where a pass writes, and what it reads."""

    row_N: Tensor
    """Rows of the tokens that the next pass writes, int64; N is T of a packed row, and B in decoding."""
    slot_N: Tensor
    """Their slots, int64."""
    capacity: int
    visible: int = 0
    """Slots that attention reads in decoding."""
    is_packed: bool = False
    continued: tuple[int, int] | None = None
    """Row, and number of its tokens, where the packed row is the last tokens of one whose first are in the cache."""


class _RowLayer(DynamicLayer):
    """Keys and values [B, K, S, D] of one layer, with free slots for new tokens."""

    keys: Tensor
    values: Tensor

    def __init__(self, slots: _Slots, rows: int) -> None:
        super().__init__()
        self._slots, self._rows = slots, rows

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens; returns what attention reads: the packed row itself with what is before it, or slots."""
        slots = self._slots
        key_states = key_states.to(value_states.dtype)  # rotary embeddings are fp32 under autocast
        if not self.is_initialized:
            self.keys, self.values = (
                # zeros: a masked slot has weight 0, and 0 times NaN would be NaN
                part.new_zeros(self._rows, part.shape[1], slots.capacity, part.shape[3])
                for part in (key_states, value_states)
            )
            self.dtype, self.device, self.is_initialized = value_states.dtype, value_states.device, True
        # indices on both sides of a slice put their dimension first: the target is [N, K, D]
        if slots.is_packed:
            self.keys[slots.row_N, :, slots.slot_N] = key_states[0].transpose(0, 1)
            self.values[slots.row_N, :, slots.slot_N] = value_states[0].transpose(0, 1)
            if slots.continued is None:
                return key_states, value_states
            row, end = slots.continued
            return self.keys[row : row + 1, :, :end], self.values[row : row + 1, :, :end]
        self.keys[slots.row_N, :, slots.slot_N] = key_states[:, :, 0]
        self.values[slots.row_N, :, slots.slot_N] = value_states[:, :, 0]
        return self.keys[:, :, : slots.visible], self.values[:, :, : slots.visible]

    def get_seq_length(self) -> int:
        """Slots that may be filled before this pass."""
        return max(self._slots.visible - 1, 0)

    def move(self, rows_L: Tensor, filled: int, rows: int) -> None:
        """Move some rows' first slots into new memory with so many rows, of the capacity that was set."""
        self._rows = rows
        if self.is_initialized:  # else it shares the keys of another layer
            self.keys = _moved(self.keys, rows_L, filled, rows, self._slots.capacity)
            self.values = _moved(self.values, rows_L, filled, rows, self._slots.capacity)


class RowCache(Cache):
    """A cache of rows with lengths of their own: a row's token t is in slot t, and its next one goes behind its last.

    Layers with a sliding window hold all tokens too, and the mask narrows what they see. Layers that share the keys of
    another layer have none of their own. Raises UserError for a model with layers other than attention.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int) -> None:
        """capacity: slots of a row."""
        config = model.config.get_text_config(decoder=True)
        _refuse_other_layers(config)
        self.rows = rows
        self._device, self._windows = model.device, _windows(config)
        self._slots = _Slots(self._index(np.arange(rows)), self._index(np.zeros(rows, np.int64)), capacity)
        super().__init__(layers=[_RowLayer(self._slots, rows) for _ in range(config.num_hidden_layers)])

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self._slots.capacity

    @property
    def positions(self) -> Tensor:
        """Positions of the tokens that a decoding pass writes, int64 [B, 1]."""
        return self._slots.slot_N[:, None]

    @property
    def mask(self) -> Tensor | dict[str, Tensor]:
        """Slots that the tokens of a decoding pass attend to, themselves included: bool [B, 1, 1, S], by the kind of
        layer where a model has several. Made on the device from `positions` alone."""
        slot_S = torch.arange(self._slots.visible, device=self._device)
        # bool and 4-D is right under sdpa only: with eager attention it is silently wrong
        last_B111 = self._slots.slot_N[:, None, None, None]
        past = slot_S <= last_B111
        masks = {
            kind: past if size is None else past & (slot_S > last_B111 - size)
            for kind, size in self._windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @contextmanager
    def packed(self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Iterator[None]:
        """The pass inside writes tokens `starts` to `ends` of these rows (int64), packed end to end.

        Rows that start behind their first token go alone, and attend to what the cache holds before it.
        """
        lengths, previous = ends - starts, (self._slots.row_N, self._slots.slot_N)
        slots = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        self._slots.row_N, self._slots.slot_N = self._index(np.repeat(rows, lengths)), self._index(slots)
        self._slots.is_packed = True
        if starts.any():
            assert len(rows) == 1
            self._slots.continued = int(rows[0]), int(ends[0])
        try:
            yield
        finally:
            self._slots.row_N, self._slots.slot_N = previous
            self._slots.is_packed, self._slots.continued = False, None

    def decode(self, lengths_B: np.ndarray) -> None:
        """The next pass writes one token of every row, behind so many (int64)."""
        self._slots.slot_N.copy_(torch.from_numpy(lengths_B), non_blocking=True)
        self._slots.visible = int(lengths_B.max()) + 1

    def move(self, places: np.ndarray, filled: int, rows: int, capacity: int) -> Tensor:
        """Move the first `filled` slots of these rows (int64), which become the first of `rows`, into new memory;
        returns `places` on the device."""
        places_L = self._index(places)
        self.rows, self._slots.capacity = rows, capacity
        self._slots.row_N, self._slots.slot_N = (
            self._index(part) for part in (np.arange(rows), np.zeros(rows, np.int64))
        )
        for layer in self.layers:
            assert isinstance(layer, _RowLayer)
            layer.move(places_L, filled, rows)
        return places_L

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)


def _moved(cached_BKSD: Tensor, rows_L: Tensor, filled: int, rows: int, capacity: int) -> Tensor:
    _, heads, _, size = cached_BKSD.shape
    moved = cached_BKSD.new_zeros(rows, heads, capacity, size)
    moved[: len(rows_L), :, :filled] = cached_BKSD[:, :, :filled].index_select(
        0, rows_L.to(cached_BKSD.device)
    )
    return moved


def _windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Window of each kind of layers, by transformers' names; None: all tokens."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or (
        "full_attention" if window is None else "sliding_attention",
    )
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def _refuse_other_layers(config: PreTrainedConfig) -> None:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
    if others:
        raise UserError(
            f"model.path: {config.model_type} has layers of the kind {others[0]!r}, which cache other things than keys "
            "and values of tokens, so it cannot generate here; choose a model that has attention alone"
        )
