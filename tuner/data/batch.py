"""The one batch type: a packed row of tokens with segment borders and the weights of its learned tokens.

Shapes: T tokens of the row, N of them learned, S segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tuner.data.examples import Examples
from tuner.data.packing import pack


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

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(end - start for start, end in itertools.pairwise(self.borders))

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device, copied without waiting for it."""
        return replace(
            self,
            tokens_T=self.tokens_T.to(device, non_blocking=True),
            learned_N=self.learned_N.to(device, non_blocking=True),
            weights_N=self.weights_N.to(device, non_blocking=True),
            positions_T=self.positions_T.to(device, non_blocking=True),
            offsets=self.offsets.to(device, non_blocking=True),
        )


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


def make_batches(examples: Examples, tokens_per_pass: int) -> list[Batch]:
    """All samples of a small set, packed in passes: for measuring held-out rows."""
    groups = pack(examples.lengths.tolist(), max(tokens_per_pass, int(examples.lengths.max())))
    return [make_batch([examples.example(index) for index in group]) for group in groups]
