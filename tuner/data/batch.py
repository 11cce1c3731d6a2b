"""The one batch type: a packed row of tokens with segment borders and the weights of its learned tokens.

Shapes: T tokens of the row, N of them learned, S segments, P pairs of segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from tuner.data.comparisons import Comparisons
from tuner.data.examples import Examples
from tuner.data.packing import pack


@dataclass(frozen=True)
class Pairs:
    """Segments of a row that are compared."""

    better_P: torch.Tensor
    """Number of the better segment of each pair, int64."""
    worse_P: torch.Tensor
    weights_P: torch.Tensor
    """Weight of the pair, float32."""
    margins_P: torch.Tensor
    """Score by which the better segment must lead, float32."""


@dataclass(frozen=True)
class Batch:
    """One forward and backward pass: S samples end to end, nothing padded."""

    tokens_T: torch.Tensor
    """Token ids, int64."""

    learned_N: torch.Tensor
    """Where in the row the learned tokens stand, int64; never a segment's first."""

    weights_N: torch.Tensor
    """Weight with which each of them is learned, float32."""

    positions_T: torch.Tensor
    """Position of each token in its own segment, int64."""

    offsets: torch.Tensor
    """Where segments begin and end, int32 [S + 1]: the truth about isolation, which positions are not."""

    borders: tuple[int, ...]
    """`offsets` on the host, so that nothing has to ask the device for them."""

    pairs: Pairs | None = None
    """Which segments are compared; None where segments are learned for themselves."""

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(end - start for start, end in itertools.pairwise(self.borders))

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device, copied without waiting for it."""
        return _moved(self, device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name, to be written down."""
        return _tensors(self)


def make_batch(samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """The packed row of some samples, each (tokens int32 [t], weights float32 [t])."""
    borders = np.cumsum([0, *(len(tokens) for tokens, _ in samples)])
    positions = np.concatenate([np.arange(len(tokens)) for tokens, _ in samples])
    weights = np.concatenate([weights for _, weights in samples])
    weights[borders[:-1]] = 0  # nothing comes before a sample's first token, in whatever pack it stands
    learned = np.flatnonzero(weights)
    return Batch(
        tokens_T=torch.from_numpy(np.concatenate([tokens for tokens, _ in samples]).astype(np.int64)),
        learned_N=torch.from_numpy(learned),
        weights_N=torch.from_numpy(weights[learned]),
        positions_T=torch.from_numpy(positions),
        offsets=torch.from_numpy(borders.astype(np.int32)),
        borders=tuple(borders.tolist()),
    )


def gather(examples: Examples | Comparisons, indices: Sequence[int]) -> Batch:
    """Some samples, or rows of answers with their pairs, as one packed row."""
    if isinstance(examples, Examples):
        return make_batch([examples.example(index) for index in indices])
    answers, pairs = examples.answers(indices), examples.pairs(indices)
    first = np.cumsum([0, *np.diff(examples.offsets)[indices]])[:-1]  # segment at which each row begins
    firsts = np.repeat(first, np.diff(examples.pair_offsets)[indices])
    return replace(
        make_batch([examples.sequences.example(index) for index in answers.tolist()]),
        pairs=Pairs(
            better_P=torch.from_numpy(firsts + examples.better[pairs]),
            worse_P=torch.from_numpy(firsts + examples.worse[pairs]),
            weights_P=torch.from_numpy(examples.weights[pairs]),
            margins_P=torch.from_numpy(examples.margins[pairs]),
        ),
    )


def make_batches(examples: Examples | Comparisons, tokens_per_pass: int) -> list[Batch]:
    """All of a small set, packed in passes: for measuring held-out rows."""
    groups = pack_all(examples.lengths, tokens_per_pass)
    return [gather(examples, group) for group in groups]


def pack_all(lengths: np.ndarray, tokens_per_pass: int) -> list[list[int]]:
    """The passes of a small set; one that is longer than a pass makes a pass of its own."""
    return pack(lengths.tolist(), max(tokens_per_pass, int(lengths.max())))


def _moved(part: Any, device: torch.device) -> Any:
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    moved = {
        name: value.to(device, non_blocking=True)
        if isinstance(value, torch.Tensor)
        else _moved(value, device)
        for name, value in values.items()
        if isinstance(value, torch.Tensor | Pairs)
    }
    return replace(part, **moved)


def _tensors(part: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        found |= _tensors(value) if isinstance(value, Pairs) else {}
        found |= {field.name: value} if isinstance(value, torch.Tensor) else {}
    return found
