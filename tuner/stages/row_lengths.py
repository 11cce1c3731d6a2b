"""Rows against the positions of the model that reads them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tuner.data.comparisons import Comparisons
from tuner.data.dataset import Dataset
from tuner.data.examples import Examples
from tuner.data.labels import Labels
from tuner.data.prompts import PromptSet
from tuner.errors import UserError
from tuner.models.positions import Positions


def long_rows(rows: Dataset[Any], positions: Positions, max_new_tokens: int = 0) -> list[str]:
    """A sentence on the rows that are longer than the model was trained for; none where there are none.

    max_new_tokens: tokens generated after each row. Raises UserError for a row that is longer than learned positions
    go: the model cannot read it.
    """
    longer, total, sentence = 0, 0, ""
    for part in (rows.train, rows.validation, rows.test):
        if part is None or not len(part):
            continue
        sequences = _sequences(part)
        lengths = sequences.lengths + max_new_tokens
        longest = int(lengths.argmax())
        where = f"{lengths[longest]:,} in {sequences.origin(longest)}"
        if positions.limit is not None and lengths[longest] > positions.limit:
            raise UserError(
                f"{sequences.origin(longest)}: {lengths[longest]:,} tokens, and the model has learned positions for "
                f"{positions.limit:,}; lower max_length to that, or shorten the row"
            )
        total += len(lengths)
        if positions.trained is not None and (count := int(np.count_nonzero(lengths > positions.trained))):
            sentence = sentence or where
            longer += count
    if not longer:
        return []
    return [
        f"{longer:,} of {total:,} rows are longer than the {positions.trained:,} tokens that the model was trained for "
        f"(up to {sentence}): set model.rope, or lower max_length"
    ]


def _sequences(part: Examples | Comparisons | Labels | PromptSet) -> Examples:
    """What the model reads of a part, a sequence each."""
    if isinstance(part, Comparisons | Labels):
        return part.sequences
    return part.examples() if isinstance(part, PromptSet) else part
