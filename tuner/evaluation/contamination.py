"""Test rows that stand in the training rows.

The rule is GPT-3's (Brown et al. 2020, arXiv 2005.14165, appendix C): texts are compared by N-grams of words in
lower case without punctuation. N is the 5th percentile of the test rows' lengths in words, at least 8 and at most 13.
A row is seen where one of its N-grams stands in a training row; a row whose texts all have fewer than N words is seen
where the words of its longest text stand in a training row in a sequence. It finds copies, not paraphrases, and only
in the rows of these runs: what the base was pretrained on is not known.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"[^\W_]+")
_FEWEST, _MOST = 8, 13


@dataclass(frozen=True, eq=False)
class Contamination:
    """Which of A test rows stand in the training rows."""

    seen_A: np.ndarray
    """bool."""
    words: int
    """N."""
    training_rows: int


def contamination(rows: Sequence[Sequence[str]], training: Iterable[str]) -> Contamination:
    """Compare test rows, each of several texts, with training rows. The latter are read once and not kept."""
    words = [[_words(text) for text in texts] for texts in rows]
    length = ngram_length([sum(map(len, texts)) for texts in words])
    # word sequence -> rows, by its length: those of short rows are shorter
    rows_of: dict[int, dict[tuple[str, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, texts in enumerate(words):
        for sequence in _sequences(texts, length):
            rows_of[len(sequence)][sequence].append(row)
    seen_A, count = np.zeros(len(rows), bool), 0
    for text in training:
        count += 1
        trained = _words(text)
        for size, index in rows_of.items():
            for start in range(len(trained) - size + 1):
                if (found := index.get(tuple(trained[start : start + size]))) is not None:
                    seen_A[found] = True
    return Contamination(seen_A, length, count)


def ngram_length(lengths: Sequence[int]) -> int:
    """N for test rows of these lengths in words."""
    return int(np.clip(np.percentile(lengths, 5), _FEWEST, _MOST)) if lengths else _MOST


def _sequences(texts: Sequence[list[str]], length: int) -> set[tuple[str, ...]]:
    """The word sequences that a row is known by: its texts' N-grams, or its longest text where all are shorter."""
    longest = max(texts, key=len, default=[])
    if len(longest) < length:
        return {tuple(longest)} if longest else set()
    return {tuple(text[start : start + length]) for text in texts for start in range(len(text) - length + 1)}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
