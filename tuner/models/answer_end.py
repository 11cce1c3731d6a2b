"""Where generated answers end: at an end token, or with the token that completes a stop text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tuner.models.sampling import Forbidden

INCOMPLETE = 8
"""Tokens looked at besides those that can hold a stop text: the first of them may be parts of a character."""


@dataclass(frozen=True)
class StopTexts:
    """Texts that end an answer."""

    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]

    def found_at_end(self, tokens: Sequence[int]) -> int:
        """Characters from the start of the first stop text that the last of these tokens completes; 0 for none.

        A stop text that an earlier token completed does not count.
        """
        # a token is a byte or more: decoding whole answers at every token would take quadratic time
        tail = list(tokens[-(max(len(text.encode()) for text in self.texts) + INCOMPLETE) :])
        decoded = self._decode(tail)
        if not any(text in decoded for text in self.texts):
            return 0
        before = _common_prefix(decoded, self._decode(tail[:-1]))
        starts = [decoded.find(text, max(0, before - len(text) + 1)) for text in self.texts]
        return max((len(decoded) - start for start in starts if start >= 0), default=0)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))


class AnswerEnds:
    """Decides token by token which rows have ended. Shapes: B rows generated together, L of them not ended."""

    def __init__(self, end_ids: Collection[int], stop: StopTexts | None, min_new_tokens: int) -> None:
        """min_new_tokens: so many tokens of an answer cannot end it."""
        self._ids, self._stop, self._min_new_tokens = np.fromiter(end_ids, np.int64), stop, min_new_tokens
        self._answers: dict[int, list[int]] = {}

    def forbidden(self, places_B: np.ndarray, device: torch.device) -> Forbidden | None:
        """What may not be sampled as the tokens in these places of answers; None for nothing."""
        rows_B = places_B < self._min_new_tokens
        if not rows_B.any() or not len(self._ids):
            return None
        return Forbidden(
            *(torch.from_numpy(part).to(device, non_blocking=True) for part in (self._ids, rows_B))
        )

    def of(
        self, places_L: np.ndarray, rows_L: np.ndarray, tokens_L: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whether each row's token ends its answer, bool [L]; characters that a stop text cuts off it, int64 [L].

        places_L: of the tokens in their answers.
        """
        ended_L, cut_L = np.isin(tokens_L, self._ids), np.zeros(len(rows_L), np.int64)
        if self._stop is not None:
            for index, (row, token) in enumerate(zip(rows_L.tolist(), tokens_L.tolist(), strict=True)):
                answer = self._answers.setdefault(row, [])
                answer.append(int(token))
                if places_L[index] >= self._min_new_tokens and not ended_L[index]:
                    cut_L[index] = self._stop.found_at_end(answer)
        return ended_L | (cut_L > 0), cut_L


def _common_prefix(text: str, other: str) -> int:
    """Number of characters that two texts begin with alike."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (one, two) in pairs if one != two), min(len(text), len(other)))
