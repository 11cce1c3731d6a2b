"""Policies compared: how often one answers the same prompts better than another, by the reward model and by a rule.

Pure functions of judged answers. Shapes: A answers, one to each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tuner.data.conditions import drawing_key
from tuner.data.prompts import PromptSet
from tuner.evaluation.intervals import Interval, mean, share, sign_test, win_share
from tuner.evaluation.judge import Answers, Judge, Judged
from tuner.evaluation.position_loss import RangeLoss, mean_loss

TIE = 1e-4
"""Learned scores that differ by less are equal; gold scores only where they are the same."""
ALL = ""
"""Name of the group of all prompts, beside those of conditions."""

JUDGES = ("score", "gold")
"""Who says which answer is better: the reward model, and the rule where there is one."""


@dataclass(frozen=True, eq=False)
class Contestant:
    """A policy's answers, judged."""

    name: str
    path: str
    answers: Answers
    judged: Judged

    def values(self, judge: str) -> np.ndarray | None:
        """Its scores by the reward model or the rule, float64 [A]; None where there is no rule."""
        return self.judged.scores_A if judge == "score" else self.judged.golds_A


@dataclass(frozen=True)
class Measured:
    """A policy on some of the prompts."""

    prompts: int
    score: Interval
    gold: Interval | None
    ended: float
    """Share of answers that came to their end."""
    length: float
    """Mean, in tokens of the policy's own."""


@dataclass(frozen=True)
class WinRate:
    """How one policy does against another, by one judge, on some of the prompts."""

    rate: Interval
    """Share of prompts on which it scores higher, ties half."""
    wins: int
    ties: int
    losses: int
    p: float
    """Of the sign test: how likely as uneven a result would be if both were as good."""
    difference: Interval
    """Its mean score less the other's."""

    @property
    def prompts(self) -> int:
        return self.wins + self.ties + self.losses


@dataclass(frozen=True, eq=False)
class Match:
    """One policy against another: by judge, and by condition (ALL: over all prompts)."""

    other: Contestant
    rates: Mapping[str, Mapping[str, WinRate]]


@dataclass(frozen=True, eq=False)
class PolicyCard:
    """What a policy is worth on held-out prompts, alone and against others."""

    own: Contestant
    matches: Sequence[Match]
    replay: Sequence[RangeLoss]
    """Loss of the held-out replay rows, by position."""

    @property
    def contestants(self) -> list[Contestant]:
        """The policy itself first."""
        return [self.own, *(match.other for match in self.matches)]


def judge_all(judge: Judge, answers: Sequence[Answers]) -> list[Judged]:
    """Scores of several policies' answers to the same prompts. Equal answers are judged once, so that they tie."""
    pairs = {(place, text): None for one in answers for place, text in enumerate(one.texts)}
    numbers = {pair: number for number, pair in enumerate(pairs)}
    distinct = replace(judge, prompts=judge.prompts.take([place for place, _ in pairs]))
    judged = distinct.judge([text for _, text in pairs])
    return [_of(judge.prompts, policy, judged, numbers) for policy in answers]


def _of(
    prompts: PromptSet, answers: Answers, found: Judged, numbers: Mapping[tuple[int, str], int]
) -> Judged:
    chosen_A = np.array([numbers[pair] for pair in enumerate(answers.texts)])
    golds_A = None if found.golds_A is None else found.golds_A[chosen_A]
    return Judged(prompts, answers.texts, found.scores_A[chosen_A], golds_A)


def policy_card(
    own: Contestant, others: Sequence[Contestant], replay: Sequence[RangeLoss] = ()
) -> PolicyCard:
    """A policy measured, and compared with each of the others on the same prompts."""
    clusters_A = clusters(own.judged.prompts)
    return PolicyCard(own, [_match(own, other, clusters_A) for other in others], replay)


def clusters(prompts: PromptSet) -> np.ndarray:
    """int64 [A]: prompts with the same number ask the same thing, whatever their conditions."""
    seen: dict[bytes, int] = {}
    keys = [drawing_key(prompts.prompt(index).turns) for index in range(len(prompts))]
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def groups(judged: Judged) -> dict[str, np.ndarray]:
    """Name -> which prompts are meant, bool [A]: all of them, then those of each condition, where there are any."""
    return {ALL: np.ones(len(judged.scores_A), dtype=bool), **judged.conditions()}


def measure(one: Contestant) -> dict[str, Measured]:
    """A policy on all prompts, and on those of each condition."""
    clusters_A = clusters(one.judged.prompts)
    return {name: _measured(one, chosen_A, clusters_A) for name, chosen_A in groups(one.judged).items()}


def outcomes(judge: str, own_A: np.ndarray, other_A: np.ndarray) -> np.ndarray:
    """float64 [A]: 1 where one scores higher than the other by a judge, -1 where lower, 0 where they tie."""
    apart_A = own_A - other_A
    return np.where(np.abs(apart_A) < (TIE if judge == "score" else 0), 0.0, np.sign(apart_A))


def win_rate(judge: str, own_A: np.ndarray, other_A: np.ndarray, clusters_A: np.ndarray) -> WinRate:
    """How scores do against others on the same prompts."""
    signs_A = outcomes(judge, own_A, other_A)
    return WinRate(
        rate=win_share(signs_A, clusters_A),
        wins=int((signs_A > 0).sum()),
        ties=int((signs_A == 0).sum()),
        losses=int((signs_A < 0).sum()),
        p=sign_test(signs_A, clusters_A),
        difference=mean(own_A - other_A, clusters_A),
    )


def _match(own: Contestant, other: Contestant, clusters_A: np.ndarray) -> Match:
    rates: dict[str, dict[str, WinRate]] = {}
    for judge in JUDGES:
        own_A, other_A = own.values(judge), other.values(judge)
        if own_A is not None and other_A is not None:
            rates[judge] = {
                name: win_rate(judge, own_A[chosen_A], other_A[chosen_A], clusters_A[chosen_A])
                for name, chosen_A in groups(own.judged).items()
            }
    return Match(other, rates)


def _measured(one: Contestant, chosen_A: np.ndarray, clusters_A: np.ndarray) -> Measured:
    golds_A, clusters_A = one.judged.golds_A, clusters_A[chosen_A]
    return Measured(
        prompts=int(chosen_A.sum()),
        score=mean(one.judged.scores_A[chosen_A], clusters_A),
        gold=None if golds_A is None else share(golds_A[chosen_A], clusters_A),
        ended=float(one.answers.ended_A[chosen_A].mean()),
        length=float(one.answers.lengths_A[chosen_A].mean()),
    )


def results(card: PolicyCard) -> dict[str, Any]:
    """Plain values: {"prompts", "score": {"value", "low", "high"}, "gold", "ended", "length", "conditions": {...}} of
    the policy, its "replay" loss and "positions", and under "against" the same of each other one, with "wins": by the
    judges, and by condition below. "gold" is absent without a rule, "replay" without held-out rows."""
    found = {"name": card.own.name, **_plain_measures(card.own)}
    if card.replay:
        found["replay"] = mean_loss(card.replay)
        found["positions"] = [{"from": one.start, "to": one.end, "loss": one.loss} for one in card.replay]
    if card.matches:
        found["against"] = [
            {
                "name": match.other.name,
                "path": match.other.path,
                **_plain_measures(match.other),
                "wins": _by_condition(
                    {
                        name: {judge: asdict(rates[name]) for judge, rates in match.rates.items()}
                        for name in match.rates["score"]
                    }
                ),
            }
            for match in card.matches
        ]
    return found


def _plain_measures(one: Contestant) -> dict[str, Any]:
    return _by_condition({name: _present(asdict(found)) for name, found in measure(one).items()})


def _by_condition(groups: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """All prompts' values, and the conditions' below them."""
    return {
        **groups[ALL],
        "conditions": {name: values for name, values in groups.items() if name != ALL},
    }


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
