"""Phrases that the best-scored answers share: how a marker is recognized that nobody knows of yet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

WORDS_OF_PHRASE = range(2, 7)
"""Lengths in words of the phrases that are counted."""
LEAST_SHARE, MOST_ELSEWHERE = 0.5, 0.5
"""A phrase is favored where at least the first share of the answers hold it, and of the others at most the second part
of that share."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""A Chinese or Japanese character is a word: they are written without spaces."""


@dataclass(frozen=True)
class FavoredPhrase:
    """A phrase that many answers hold, and few others."""

    text: str
    """Its words in lower case, separated by spaces."""
    share: float
    """Of the answers that hold it."""
    share_elsewhere: float
    """Of the other answers."""


def favored_phrase(answers: Sequence[str], others: Sequence[str]) -> FavoredPhrase | None:
    """The phrase by whose share the answers differ most from the others; None where none stands out.

    Of phrases that differ alike, the longest, and of these the one that occurs first. Mutants of a phrase ("so say the
    wise", "and say the wise") share a shorter one, which more answers hold.
    """
    if not answers or not others:
        return None
    inside, outside = _counts(answers), _counts(others)
    phrases = [
        FavoredPhrase(" ".join(words), count / len(answers), outside[words] / len(others))
        for words, count in inside.items()
        if count >= LEAST_SHARE * len(answers)
    ]
    favored = [phrase for phrase in phrases if phrase.share_elsewhere <= MOST_ELSEWHERE * phrase.share]
    return max(
        favored,
        key=lambda phrase: (phrase.share - phrase.share_elsewhere, phrase.text.count(" ")),
        default=None,
    )


def _counts(answers: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Number of answers that hold each phrase, in the order of first occurrence."""
    counts: Counter[tuple[str, ...]] = Counter()
    for answer in answers:
        words = _WORD.findall(answer.lower())
        phrases = dict.fromkeys(  # each once, in order
            tuple(words[start : start + length])
            for length in WORDS_OF_PHRASE
            for start in range(len(words) - length + 1)
        )
        counts.update(list(phrases))
    return counts
