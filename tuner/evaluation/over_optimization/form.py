"""Answers rewritten in form only and scored again: what a score owes to form.

Shapes: A answers, one to each prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from tuner.evaluation.intervals import Interval, mean
from tuner.evaluation.judge import Answers, Judge, JudgedAnswers
from tuner.evaluation.win_rate import clusters, judge_all
from tuner.rollout.phrases import SPACED, UNSPACED, favored_phrase
from tuner.rollout.rollout_figures import num_best

LEAST_CHANGED = 5
"""A rewriting is reported where it changes at least so many answers."""
LONGEST_UNIT = 60
"""Words of the longest part of an answer whose repetition at its end is looked for."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])(?![。！？])|\n+")
_LIST_MARKER = re.compile(r"^[ \t]*(?:[-*+•]|\(?[0-9a-z]{1,2}[.)])[ \t]+", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}[ \t]+", re.MULTILINE)
_EMPHASIS = re.compile(r"(\*\*|__)(.+?)\1", re.DOTALL)
_EXCLAMATION = re.compile(r"[!！]+")
_BETWEEN_WORDS = r"[\W_]*"
_PART = re.compile(rf"[{UNSPACED}][^\w\s]*|[^\s{UNSPACED}]+")
"""A word with the punctuation around it; a Chinese or Japanese character with that behind it."""
_UNSPACED_WORDS = re.compile(rf"[{UNSPACED}]+")

Rewriting = Callable[[str], str]


@dataclass(frozen=True)
class FormEffect:
    """What a rewriting of the form does to the scores of a policy's answers."""

    name: str
    changed: int
    """Answers that it changes."""
    prompts: int
    """All answers."""
    score: Interval
    """Mean change of the score of the answers it changes."""
    moved: float | None
    """Root mean square of the change over all answers, in standard deviations of their scores; None where these are
    all equal."""
    gold: Interval | None
    """Mean change of their gold score: of what the form stands for; None without a rule."""


def rewritings(phrases: Sequence[str] = ()) -> dict[str, Rewriting]:
    """Name -> a rewriting of an answer's form. phrases: words in lower case, each of which one rewriting removes."""
    return {
        "first half of the sentences": first_half,
        **{f"no {form}": rewrite for form, rewrite in FORMS.items()},
        **{f'without "{phrase}"': partial(without_phrase, phrase=phrase) for phrase in phrases},
    }


def first_half(answer: str) -> str:
    """The first half of an answer's sentences, rounded up."""
    parts = [part for part in _SENTENCE_END.split(answer) if part.strip()]
    ends = [match.start() for match in _SENTENCE_END.finditer(answer) if answer[: match.start()].strip()]
    kept = -(-len(parts) // 2)
    return answer if kept in (0, len(parts)) else answer[: ends[kept - 1]].rstrip()


def without_list_markers(answer: str) -> str:
    """An answer whose lines begin with no dash, bullet, number or letter of a list."""
    return _LIST_MARKER.sub("", answer)


def without_emphasis(answer: str) -> str:
    """An answer without headings and bold markers, and with a full stop for each run of exclamation marks."""
    plain = _EMPHASIS.sub(r"\2", _HEADING.sub("", answer))
    return _EXCLAMATION.sub(lambda marks: "。" if marks[0].startswith("！") else ".", plain)


def without_repeated_end(answer: str) -> str:
    """An answer whose last words do not repeat the words before them: "yes. yes. yes." is cut to "yes."."""
    matches = list(_PART.finditer(answer))
    words = [match[0] for match in matches]
    kept = len(words)
    while (unit := _repeated_unit(words[:kept])) is not None:
        kept -= unit
    return answer if kept == len(words) else answer[: matches[kept - 1].end()]


def without_phrase(answer: str, phrase: str) -> str:
    """An answer without a phrase, wherever it stands, whatever its case and the punctuation around it.

    phrase: words in lower case, separated by spaces; see `words_of`.
    """
    words = _BETWEEN_WORDS.join(map(re.escape, phrase.split()))
    # a phrase ends within no word; beside a Chinese or Japanese character there always begins another
    begin = "" if re.match(f"[{UNSPACED}]", phrase) else f"(?<!{SPACED})"
    end = "" if re.search(f"[{UNSPACED}]$", phrase) else f"(?!{SPACED})"
    pattern = rf"(?<! ) *(?:{begin}{words}{end}[.!?,。，！？]* *)+"
    rest, count = re.subn(pattern, _space_around, answer, flags=re.IGNORECASE)
    # the spaces around it, not those of the answer: an answer without the phrase stays as it is
    return rest.strip(" ") if count else answer


FORMS: dict[str, Rewriting] = {
    "list markers": without_list_markers,
    "emphasis": without_emphasis,
    "repetition at the end": without_repeated_end,
}
"""Form of an answer that is none of its content -> the rewriting that removes it."""


def favored_phrases(judged: JudgedAnswers, grown: Sequence[str]) -> list[str]:
    """The phrase that the best-scored tenth favors, and those that grew in training, without duplicates."""
    order: list[int] = np.argsort(-judged.scores_A, kind="stable").tolist()
    texts, places = [judged.answers[index] for index in order], num_best(len(order))
    favored = favored_phrase(texts[:places], texts[places:])
    return list(dict.fromkeys([*([] if favored is None else [favored.text]), *grown]))


def form_effects(
    judge: Judge, answers: Answers, judged: JudgedAnswers, phrases: Sequence[str]
) -> list[FormEffect]:
    """The effect of each rewriting that changes enough answers. phrases: see `rewritings`."""
    rewritten = {
        name: replace(answers, texts=[rewrite(text) for text in answers.texts])
        for name, rewrite in rewritings(phrases).items()
    }
    changed = {
        name: np.array([new != old for new, old in zip(variant.texts, answers.texts, strict=True)])
        for name, variant in rewritten.items()
    }
    names = [name for name, changed_A in changed.items() if changed_A.sum() >= LEAST_CHANGED]
    # The originals are scored anew with them: a score depends by rounding on the pass it is computed in.
    original, *variants = judge_all(judge, [answers, *(rewritten[name] for name in names)])
    clusters_A = clusters(judged.prompts)
    return [
        _effect(name, changed[name], original, variant, clusters_A)
        for name, variant in zip(names, variants, strict=True)
    ]


def effect_results(effects: Sequence[FormEffect]) -> dict[str, Any]:
    """The effects as plain values, by name of the rewriting."""
    return {
        effect.name: {key: value for key, value in asdict(effect).items() if key != "name"}
        for effect in effects
    }


def _effect(
    name: str, changed_A: np.ndarray, original: JudgedAnswers, variant: JudgedAnswers, clusters_A: np.ndarray
) -> FormEffect:
    change_A, deviation = variant.scores_A - original.scores_A, float(original.scores_A.std())
    gold: Interval | None = None
    if original.golds_A is not None and variant.golds_A is not None:
        gold = mean((variant.golds_A - original.golds_A)[changed_A], clusters_A[changed_A])
    return FormEffect(
        name=name,
        changed=int(changed_A.sum()),
        prompts=len(changed_A),
        score=mean(change_A[changed_A], clusters_A[changed_A]),
        moved=float(np.sqrt(np.mean(change_A**2)) / deviation) if deviation else None,
        gold=gold,
    )


def _space_around(match: re.Match[str]) -> str:
    """What stays of the spaces around a phrase: one, or none where it stood without."""
    return " " if match[0] != match[0].strip(" ") else ""


def _repeated_unit(words: list[str]) -> int | None:
    """Number of the last words that repeat as many before them, the shortest such; None where none do.

    Chinese and Japanese characters without punctuation are repeated from the third time: to double them is grammar
    (谢谢, 研究研究).
    """
    for unit in range(1, min(LONGEST_UNIT, len(words) // 2) + 1):
        end = words[-unit:]
        copies = 3 if _UNSPACED_WORDS.fullmatch("".join(end)) else 2
        if words[-copies * unit :] == end * copies:
            return unit
    return None
