"""The one batch type: a packed row of tokens with its segment borders and loss weights.

Shapes: T tokens of the row, N of them targets (tokens the loss is taken on), S segments, P pairs of segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch

from tuner.data.comparisons import Comparisons
from tuner.data.examples import Examples
from tuner.data.packing import pack


@dataclass(frozen=True)
class Pairs:
    """Pairs of a row's segments, one preferred to the other."""

    better_P: torch.Tensor
    """Index of the preferred segment of each pair, int64."""
    worse_P: torch.Tensor
    """Index of the other segment, int64."""
    weights_P: torch.Tensor
    """Loss weight of the pair, float32."""
    margins_P: torch.Tensor
    """Score by which the better segment must lead, float32."""


@dataclass(frozen=True)
class Batch:
    """What one forward and backward pass takes: S samples end to end, without padding."""

    tokens_T: torch.Tensor
    """Token ids, int64."""

    learned_N: torch.Tensor
    """Indices in the row of the target tokens, int64; never a segment's first, which nothing predicts."""

    weights_N: torch.Tensor
    """Loss weight of each target token, float32."""

    positions_T: torch.Tensor
    """Position of each token in its own segment, int64."""

    offsets: torch.Tensor
    """Cumulative lengths of the segments, int32 [S + 1]. Attention is masked by these, never by positions."""

    borders: tuple[int, ...]
    """`offsets` on the host, so that reading them does not wait for the device."""

    pairs: Pairs | None = None
    """Segments that are compared; None where every segment has a loss of its own."""

    @property
    def longest(self) -> int:
        """Length of the longest segment, in tokens."""
        return max(end - start for start, end in itertools.pairwise(self.borders))

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device, copied without blocking the host."""
        return _to_device(self, device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by the name of its field, for saving."""
        return _tensors_by_name(self)


BatchOrPairs = TypeVar("BatchOrPairs", Batch, Pairs)

_NO_SAMPLE = np.zeros(1, np.int32), np.zeros(1, np.float32)


def make_batch(samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Pack samples, each (tokens int32 [t], loss weights float32 [t]), into one row, in their order.

    Of no samples: a row of one token without a loss, for a pass that other processes need company in (see `Share`).
    """
    samples = samples or [_NO_SAMPLE]
    borders = np.cumsum([0, *(len(tokens) for tokens, _ in samples)])
    positions = np.concatenate([np.arange(len(tokens)) for tokens, _ in samples])
    # concatenate copies: the next line must not write into the dataset, which the cache maps from disk
    weights = np.concatenate([weights for _, weights in samples])
    weights[borders[:-1]] = 0  # a first token would be predicted from the end of the sample packed before it
    targets = np.flatnonzero(weights)
    return Batch(
        # int32 halves the cache, but torch's gather and scatter take int64 indices only
        tokens_T=_tensor(np.concatenate([tokens for tokens, _ in samples]).astype(np.int64)),
        learned_N=_tensor(targets),
        weights_N=_tensor(weights[targets]),
        positions_T=_tensor(positions),
        # int32: variable-length attention kernels take no other type
        offsets=_tensor(borders.astype(np.int32)),
        borders=tuple(borders.tolist()),
    )


def gather(examples: Examples | Comparisons, indices: Sequence[int]) -> Batch:
    """Pack the samples, or the comparisons with all their answers and pairs, of these indices into one row."""
    if isinstance(examples, Examples):
        return make_batch([examples.example(index) for index in indices])
    rows = np.asarray(indices, np.int64)  # of no samples, numpy would take a list for floats
    answers, pairs = examples.answers(rows), examples.pairs(rows)
    first_segments = np.cumsum([0, *np.diff(examples.offsets)[rows]])[:-1]  # of each comparison
    first_of_pair = np.repeat(first_segments, np.diff(examples.pair_offsets)[rows])
    return replace(
        make_batch([examples.sequences.example(index) for index in answers.tolist()]),
        pairs=Pairs(
            better_P=_tensor(first_of_pair + examples.better[pairs]),
            worse_P=_tensor(first_of_pair + examples.worse[pairs]),
            weights_P=_tensor(examples.weights[pairs]),
            margins_P=_tensor(examples.margins[pairs]),
        ),
    )


def pack_all(lengths: np.ndarray, tokens_per_pass: int) -> list[list[int]]:
    """Indices of a small set, grouped into passes. The capacity of a pass is at least the longest sample."""
    # a ranked list's answers may together exceed a pass, and a row is never split
    return pack(lengths.tolist(), max(tokens_per_pass, int(lengths.max())))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]  # torch declares no type for it


def _to_device(part: BatchOrPairs, device: torch.device) -> BatchOrPairs:
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    copies = {
        name: value.to(device, non_blocking=True)
        if isinstance(value, torch.Tensor)
        else _to_device(value, device)
        for name, value in values.items()
        if isinstance(value, torch.Tensor | Pairs)
    }
    return replace(part, **copies)


def _tensors_by_name(part: Batch | Pairs) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Pairs):
            tensors |= _tensors_by_name(value)
        elif isinstance(value, torch.Tensor):
            tensors[field.name] = value
    return tensors
