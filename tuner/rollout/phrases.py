"""Phrases that the best-scored answers share, or that grow: how a marker is recognized that nobody knows of yet."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

WORDS_OF_PHRASE = range(2, 7)
"""Lengths in words of the phrases that are counted."""
LEAST_SHARE, MOST_ELSEWHERE = 0.5, 0.5
"""A phrase is favored where at least the first share of the answers hold it, and of the others at most the second part
of that share."""
LEAST_DEVIATIONS = 4.0
"""A phrase grows where its shares differ by so many standard errors: thousands of phrases are compared."""
EXTENDED = 0.8
"""Part of a phrase's growth that a longer phrase around it must have to stand for it."""
LEAST_WORDS_OF_MUTANT, MOST_MUTANTS = 3, 3
"""Words of a phrase whose mutants are counted, and mutants of a phrase that are named."""
UNSPACED = r"\u3040-\u30ff\u3400-\u9fff"
"""Chinese and Japanese characters, as part of a pattern's class: each is a word, since they are written without
spaces."""
SPACED = rf"[^\W_{UNSPACED}]"
"""Pattern of a character of a word of other languages, which are written with spaces."""
_WORD = re.compile(rf"[{UNSPACED}]|{SPACED}+")


@dataclass(frozen=True)
class FavoredPhrase:
    """A phrase that many answers hold, and few others."""

    text: str
    """Its words in lower case, separated by spaces."""
    share: float
    """Of the answers that hold it."""
    share_elsewhere: float
    """Of the other answers."""


@dataclass(frozen=True)
class GrowingPhrase:
    """A phrase that more answers hold than before."""

    text: str
    """Its words in lower case, separated by spaces."""
    share: float
    """Of the answers that hold it."""
    share_before: float
    """Of the earlier answers."""
    mutants: Mapping[str, float]
    """Phrases that differ from it in one word -> share of the answers that hold them and not the phrase itself."""


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


def growing_phrases(answers: Sequence[str], before: Sequence[str], most: int = 5) -> list[GrowingPhrase]:
    """Phrases whose share has grown beyond chance since earlier answers, the largest growth first.

    A phrase is named by the longest one around it that has grown nearly as much (EXTENDED), and of phrases that share
    two adjacent words only one is named.
    """
    if not answers or not before:
        return []
    now, then = _counts(answers), _counts(before)
    growth = {
        words: count / len(answers) - then[words] / len(before)
        for words, count in now.items()
        if _deviations(count, len(answers), then[words], len(before)) >= LEAST_DEVIATIONS
    }
    phrases: list[GrowingPhrase] = []
    named: set[tuple[str, str]] = set()
    for words in sorted(growth, key=lambda words: growth[words], reverse=True):
        if len(phrases) < most and named.isdisjoint(pairwise(words)):
            around = [
                longer
                for longer in growth
                if growth[longer] >= EXTENDED * growth[words]
                and named.isdisjoint(pairwise(longer))
                and f" {' '.join(words)} " in f" {' '.join(longer)} "
            ]
            named_by = max(around, key=lambda longer: (len(longer), growth[longer]))
            named |= set(pairwise(named_by))
            share, share_before = now[named_by] / len(answers), then[named_by] / len(before)
            mutants = _mutants(named_by, answers)
            phrases.append(GrowingPhrase(" ".join(named_by), share, share_before, mutants))
    return phrases


def phrase_share(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that hold a phrase, given as words in lower case; 0 of no answers."""
    words = f" {text} "
    held = sum(words in f" {' '.join(words_of(answer))} " for answer in answers)
    return held / len(answers) if answers else 0.0


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def _deviations(count: int, total: int, count_before: int, total_before: int) -> float:
    """Growth of a share in standard errors of the difference of two shares, pooled."""
    pooled = (count + count_before) / (total + total_before)
    error = math.sqrt(pooled * (1 - pooled) * (1 / total + 1 / total_before))
    return (count / total - count_before / total_before) / error if error else 0.0


def _mutants(words: tuple[str, ...], answers: Sequence[str]) -> dict[str, float]:
    """The commonest phrases that differ from one in a word, with the share of answers that hold them in its place."""
    if len(words) < LEAST_WORDS_OF_MUTANT:
        return {}
    counts: Counter[str] = Counter()
    for answer in answers:
        held = _phrases(answer, range(len(words), len(words) + 1))
        if words not in held:
            counts.update(
                " ".join(other)
                for other in held
                if sum(word != place for word, place in zip(words, other, strict=True)) == 1
            )
    return {text: count / len(answers) for text, count in counts.most_common(MOST_MUTANTS)}


def _counts(answers: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Number of answers that hold each phrase, in the order of first occurrence."""
    counts: Counter[tuple[str, ...]] = Counter()
    for answer in answers:
        counts.update(list(_phrases(answer, WORDS_OF_PHRASE)))
    return counts


def _phrases(answer: str, lengths: range) -> dict[tuple[str, ...], None]:
    """The phrases of an answer, each once, in the order of first occurrence."""
    words = words_of(answer)
    return dict.fromkeys(
        tuple(words[start : start + length]) for length in lengths for start in range(len(words) - length + 1)
    )
