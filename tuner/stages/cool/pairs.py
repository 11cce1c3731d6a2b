"""Pairs of answers that are worth a label: the slow path and the fast path of COOL RLHF."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tuner.config import Candidates
from tuner.stages.cool.labels import SLOW
from tuner.stages.cool.patterns import Pattern, rewriting_of


@dataclass(frozen=True)
class PolicyAnswer:
    """An answer to a training prompt."""

    prompt: int
    """Index of the prompt among the training prompts."""
    text: str
    policy: str
    """The policy that gave it: "start", a milestone's name, or "last"."""
    score: float
    """By the round's reward model."""


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to a prompt, and why they are compared."""

    first: PolicyAnswer
    second: PolicyAnswer
    pattern: str


def slow_pairs(answers: Sequence[PolicyAnswer], settings: Candidates, seed: int) -> list[AnswerPair]:
    """Pairs of different policies' answers to a prompt, at random, at most one to a prompt before any has two."""
    source = random.Random(f"slow {seed}")
    by_prompt = {prompt: _different_policies(group, source) for prompt, group in _by_prompt(answers).items()}
    return list(_round_robin(by_prompt, settings.slow, source))


def fast_pairs(
    pattern: Pattern, answers: Sequence[PolicyAnswer], settings: Candidates, seed: int
) -> list[AnswerPair]:
    """Pairs of which one answer carries a pattern: an earlier policy's answer, or the same without it, beside it.

    Of each prompt, the last policy's best-scored answer that carries it meets the best-scored one of earlier policies
    that does not: these differ in more than the pattern. The same answers with and without it are drawn at random.
    """
    by_score = sorted(answers, key=lambda answer: -answer.score)
    carriers = [answer for answer in by_score if answer.policy == "last" and pattern.is_in(answer.text)]
    others = [answer for answer in by_score if answer.policy != "last" and not pattern.is_in(answer.text)]
    alternatives = _first_of_each_prompt(others)
    early = [
        AnswerPair(carrier, alternatives[prompt], pattern.name)
        for prompt, carrier in _first_of_each_prompt(carriers).items()
        if prompt in alternatives
    ]
    rewrite, source = rewriting_of(pattern.name), random.Random(f"fast {seed} {pattern.name}")
    minimal = [
        AnswerPair(carrier, replace(carrier, text=text, policy="last, rewritten"), pattern.name)
        for carrier in source.sample(carriers, len(carriers))
        if (text := rewrite(carrier.text)).strip()
    ]
    num_minimal = min(len(minimal), round(settings.minimal * settings.fast))
    chosen = minimal[:num_minimal] + early[: settings.fast - num_minimal]
    return chosen + minimal[num_minimal : num_minimal + settings.fast - len(chosen)]


def _first_of_each_prompt(answers: Sequence[PolicyAnswer]) -> dict[int, PolicyAnswer]:
    firsts: dict[int, PolicyAnswer] = {}
    for answer in answers:
        firsts.setdefault(answer.prompt, answer)
    return firsts


def _by_prompt(answers: Sequence[PolicyAnswer]) -> Mapping[int, list[PolicyAnswer]]:
    groups: dict[int, list[PolicyAnswer]] = defaultdict(list)
    for answer in answers:
        groups[answer.prompt].append(answer)
    return groups


def _different_policies(answers: Sequence[PolicyAnswer], source: random.Random) -> list[AnswerPair]:
    """The pairs of a prompt's answers by different policies, in random order; of equal texts none."""
    pairs = [
        AnswerPair(first, second, SLOW)
        for first, second in itertools.combinations(answers, 2)
        if first.policy != second.policy and first.text != second.text
    ]
    source.shuffle(pairs)
    return pairs


def _round_robin(
    pairs: Mapping[int, list[AnswerPair]], count: int, source: random.Random
) -> Iterator[AnswerPair]:
    """At most `count` pairs: the first of every prompt in random order, then the second of every prompt, and so on."""
    prompts = list(pairs)
    source.shuffle(prompts)
    longest = max((len(group) for group in pairs.values()), default=0)
    ordered = (
        pairs[prompt][place] for place in range(longest) for prompt in prompts if place < len(pairs[prompt])
    )
    return itertools.islice(ordered, count)
