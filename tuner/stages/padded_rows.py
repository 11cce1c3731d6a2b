"""Rows of a stage that TRL trains, as its passes hold them: a prompt and an answer each, the loss on parts of that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.data.examples import Collector, Examples
from tuner.stages.stage import Preview


@dataclass(frozen=True)
class PaddedRow:
    """The tokens that TRL trains on: prompt and answer, int32 each."""

    prompt: np.ndarray
    answer: np.ndarray
    learned: np.ndarray
    """bool: whether the loss is taken on a token of the answer."""
    label: str
    """Such as "chosen"."""
    sequence: int
    """Index of the sequence it was read as, whose origin it has."""


def preview_rows(
    rows: Iterable[PaddedRow], read_as: Examples, rows_per_pass: int, num_passes: int
) -> Preview:
    """The first passes in the order of the rows; TRL pads them, and shuffles them first."""
    collector, labels = Collector(), list[str]()
    origins = read_as.origins
    for row in rows:
        tokens = np.concatenate([row.prompt, row.answer])
        weights = np.concatenate([np.zeros(len(row.prompt), dtype=bool), row.learned]).astype(np.float32)
        weights[:1] = 0  # nothing predicts the first token
        file = origins.files[origins.file_N[row.sequence]]
        collector.add(
            (tokens, weights), int(read_as.sources[row.sequence]), file, int(origins.line_N[row.sequence])
        )
        labels.append(row.label)
    examples = collector.finish()
    assert examples is not None  # a stage refuses data without a row to train on
    starts = range(0, len(examples), rows_per_pass)[:num_passes]
    groups: Sequence[Sequence[int]] = [
        range(start, min(start + rows_per_pass, len(examples))) for start in starts
    ]
    return Preview(examples, groups, labels.__getitem__)
