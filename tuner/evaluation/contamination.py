"""Test rows that stand in the training rows.

The rule is GPT-3's (Brown et al. 2020, arXiv 2005.14165, appendix C): texts are compared by N-grams of words in
lower case without punctuation; a Chinese or Japanese character is a word. N is the 5th percentile of the test rows'
lengths in words, at least 8 and at most 13. A row is seen where one of its N-grams stands in a training row; a row
whose texts all have fewer than N words is seen where the words of its longest text stand in a training row in a
sequence. What test rows share, such as an instruction, tells nothing of any of them and is left out. It finds copies,
not paraphrases, and only in the rows of these runs: what the base was pretrained on is not known.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.rollout.phrases import words_of

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
    words = [[words_of(text) for text in texts] for texts in rows]
    length = ngram_length([sum(map(len, texts)) for texts in words])
    # word sequence -> rows, by its length: those of short rows are shorter
    rows_of: dict[int, dict[tuple[str, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, sequences in enumerate(_sequences(words, length)):
        for sequence in sequences:
            rows_of[len(sequence)][sequence].append(row)
    seen_A, count = np.zeros(len(rows), bool), 0
    for text in training:
        count += 1
        trained = words_of(text)
        for size, index in rows_of.items():
            for start in range(len(trained) - size + 1):
                if (found := index.get(tuple(trained[start : start + size]))) is not None:
                    seen_A[found] = True
    return Contamination(seen_A, length, count)


def ngram_length(lengths: Sequence[int]) -> int:
    """N for test rows of these lengths in words."""
    return int(np.clip(np.percentile(lengths, 5), _FEWEST, _MOST)) if lengths else _MOST


def _sequences(rows: Sequence[list[list[str]]], length: int) -> list[set[tuple[str, ...]]]:
    """The word sequences that each row is known by: N-grams of its texts that no different row has; else its longest
    text that none has, or where each stands in another row, its longest."""
    texts_of = [{tuple(text) for text in texts if text} for texts in rows]
    ngrams_of = [_ngrams(texts, length) for texts in texts_of]
    different = list({frozenset(texts): row for row, texts in enumerate(texts_of)}.values())
    rows_with_ngram = Counter(ngram for row in different for ngram in ngrams_of[row])
    rows_with_text = Counter(text for row in different for text in texts_of[row])
    sequences: list[set[tuple[str, ...]]] = []
    for texts, ngrams in zip(texts_of, ngrams_of, strict=True):
        own = {ngram for ngram in ngrams if rows_with_ngram[ngram] == 1}
        own_texts = [text for text in texts if rows_with_text[text] == 1] or texts
        sequences.append(
            own or ({max(own_texts, key=lambda text: (len(text), text))} if own_texts else set())
        )
    return sequences


def _ngrams(texts: Iterable[tuple[str, ...]], length: int) -> set[tuple[str, ...]]:
    return {text[start : start + length] for text in texts for start in range(len(text) - length + 1)}
