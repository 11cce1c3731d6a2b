"""Policies compared: how often a policy answers the same prompts better than another, by the reward and by a gold rule.

Pure functions of judged answers. Shapes: A answers, one to each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tuner.data.conditions import drawing_key
from tuner.data.prompts import PromptSet
from tuner.evaluation.intervals import Interval, mean, share, sign_test, win_share
from tuner.evaluation.judge import Answers, Judge, JudgedAnswers
from tuner.evaluation.position_loss import RangeLoss, mean_loss

TIE = 1e-4
"""Scores that differ by less tie, for a reward model's have rounding; gold scores tie only where they are equal."""
ALL = ""
"""Name of the group of all prompts, beside those of conditions."""

JUDGES = ("score", "gold")
"""What decides which answer is better: the reward trained on, and the gold rule where the config names one."""

Scorer = Literal["reward model", "reward models", "reward rule"]


@dataclass(frozen=True, eq=False)
class Contestant:
    """A policy with its judged answers."""

    name: str
    path: str
    answers: Answers
    judged: JudgedAnswers

    def values(self, judge: str) -> np.ndarray | None:
        """The answers' scores by the reward or the gold rule, float64 [A]; None where there is no such rule."""
        return self.judged.scores_A if judge == "score" else self.judged.golds_A

    @cached_property
    def figures(self) -> Mapping[str, PolicyFigures]:
        """Its figures on all prompts (ALL), and on those of each condition."""
        clusters_A = clusters(self.judged.prompts)
        return {name: _figures(self, inside_A, clusters_A) for name, inside_A in groups(self.judged).items()}


@dataclass(frozen=True)
class PolicyFigures:
    """The figures of a policy on some of the prompts."""

    prompts: int
    score: Interval
    gold: Interval | None
    ended: float
    """Share of answers that ended by themselves."""
    length: float
    """Mean number of tokens of an answer, by the policy's own tokenizer."""


@dataclass(frozen=True)
class WinRate:
    """A policy against another, by one judge, on some of the prompts."""

    rate: Interval
    """Share of prompts on which it scores higher, ties half."""
    wins: int
    ties: int
    losses: int
    p: float
    """Two-sided p value of the sign test (`intervals.sign_test`)."""
    difference: Interval
    """Its mean score minus the other's."""

    @property
    def prompts(self) -> int:
        return self.wins + self.ties + self.losses


@dataclass(frozen=True, eq=False)
class Match:
    """The comparison with one other policy: judge -> condition (ALL: all prompts) -> win rate."""

    other: Contestant
    rates: Mapping[str, Mapping[str, WinRate]]


@dataclass(frozen=True, eq=False)
class PolicyCard:
    """A policy measured on held-out prompts, alone and against others."""

    policy: Contestant
    matches: Sequence[Match]
    replay: Sequence[RangeLoss]
    """Loss of the held-out replay rows, by position."""
    scorer: Scorer = "reward model"
    """What gives the scores."""

    @property
    def judges(self) -> Mapping[str, str]:
        """Judge -> its name in a sentence."""
        return {"score": self.scorer, "gold": "gold rule"}

    @property
    def contestants(self) -> list[Contestant]:
        """The policy itself first."""
        return [self.policy, *(match.other for match in self.matches)]


def judge_all(judge: Judge, answers: Sequence[Answers]) -> list[JudgedAnswers]:
    """Scores of several policies' answers to the same prompts.

    Equal answers to a prompt are scored once, so that they tie exactly.
    """
    # A score depends by rounding on the pass it is computed in: equal texts scored apart could win or lose.
    pairs = {(place, text): None for policy in answers for place, text in enumerate(policy.texts)}
    numbers = {pair: number for number, pair in enumerate(pairs)}
    distinct = replace(judge, prompts=judge.prompts.take([place for place, _ in pairs]))
    judged = distinct.judge([text for _, text in pairs])
    return [_select(judge.prompts, policy, judged, numbers) for policy in answers]


def _select(
    prompts: PromptSet, answers: Answers, judged: JudgedAnswers, numbers: Mapping[tuple[int, str], int]
) -> JudgedAnswers:
    """One policy's answers out of the judged distinct ones; numbers: (prompt, text) -> place among these."""
    places_A = np.array([numbers[pair] for pair in enumerate(answers.texts)])
    golds_A = None if judged.golds_A is None else judged.golds_A[places_A]
    return JudgedAnswers(prompts, answers.texts, judged.scores_A[places_A], golds_A)


def policy_card(
    policy: Contestant,
    others: Sequence[Contestant],
    replay: Sequence[RangeLoss] = (),
    scorer: Scorer = "reward model",
) -> PolicyCard:
    """A policy measured, and compared with each of the others on the same prompts."""
    # From the prompts, not their tokens: policies read them in different chat templates.
    clusters_A = clusters(policy.judged.prompts)
    return PolicyCard(policy, [_match(policy, other, clusters_A) for other in others], replay, scorer)


def clusters(prompts: PromptSet) -> np.ndarray:
    """Number of each prompt's cluster, int64 [A]: prompts with the same turns share one, whatever their conditions."""
    numbers: dict[bytes, int] = {}
    keys = [drawing_key(prompts.prompt(index).turns) for index in range(len(prompts))]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def groups(judged: JudgedAnswers) -> dict[str, np.ndarray]:
    """Name -> mask of its prompts, bool [A]: all of them (ALL), then those of each condition that occurs."""
    return {ALL: np.ones(len(judged.scores_A), dtype=bool), **judged.conditions()}


def outcomes(judge: str, scores_A: np.ndarray, others_A: np.ndarray) -> np.ndarray:
    """float64 [A]: 1 where a judge's score is higher than the other policy's, -1 where lower, 0 where they tie."""
    gaps_A = scores_A - others_A
    return np.where(np.abs(gaps_A) < (TIE if judge == "score" else 0), 0.0, np.sign(gaps_A))


def win_rate(judge: str, scores_A: np.ndarray, others_A: np.ndarray, clusters_A: np.ndarray) -> WinRate:
    """The win rate of a policy by its scores and another's on the same prompts."""
    signs_A = outcomes(judge, scores_A, others_A)
    return WinRate(
        rate=win_share(signs_A, clusters_A),
        wins=int((signs_A > 0).sum()),
        ties=int((signs_A == 0).sum()),
        losses=int((signs_A < 0).sum()),
        p=sign_test(signs_A, clusters_A),
        difference=mean(scores_A - others_A, clusters_A),
    )


def _match(policy: Contestant, other: Contestant, clusters_A: np.ndarray) -> Match:
    rates: dict[str, dict[str, WinRate]] = {}
    for judge in JUDGES:
        scores_A, others_A = policy.values(judge), other.values(judge)
        if scores_A is not None and others_A is not None:
            rates[judge] = {
                name: win_rate(judge, scores_A[inside_A], others_A[inside_A], clusters_A[inside_A])
                for name, inside_A in groups(policy.judged).items()
            }
    return Match(other, rates)


def _figures(policy: Contestant, inside_A: np.ndarray, clusters_A: np.ndarray) -> PolicyFigures:
    golds_A, clusters_A = policy.judged.golds_A, clusters_A[inside_A]
    return PolicyFigures(
        prompts=int(inside_A.sum()),
        score=mean(policy.judged.scores_A[inside_A], clusters_A),
        gold=None if golds_A is None else share(golds_A[inside_A], clusters_A),
        ended=float(policy.answers.ended_A[inside_A].mean()),
        length=float(policy.answers.lengths_A[inside_A].mean()),
    )


def results(card: PolicyCard) -> dict[str, Any]:
    """The card as plain values.

    {"prompts", "score": {"value", "low", "high"}, "gold", "ended", "length", "conditions": {...}} of the policy; its
    "replay" loss with "positions"; and under "against" the same of each other policy, with "wins" by judge and, below
    "conditions", by condition. "gold" is absent without a rule, "replay" without held-out replay rows.
    """
    values = {"name": card.policy.name, **_plain_figures(card.policy)}
    if card.replay:
        values["replay"] = mean_loss(card.replay)
        values["positions"] = [
            {"from": part.start, "to": part.end, "loss": part.loss} for part in card.replay
        ]
    if card.matches:
        values["against"] = [
            {
                "name": match.other.name,
                "path": match.other.path,
                **_plain_figures(match.other),
                "wins": _by_condition(
                    {
                        name: {judge: asdict(rates[name]) for judge, rates in match.rates.items()}
                        for name in match.rates["score"]
                    }
                ),
            }
            for match in card.matches
        ]
    return values


def _plain_figures(policy: Contestant) -> dict[str, Any]:
    return _by_condition({name: _present(asdict(figures)) for name, figures in policy.figures.items()})


def _by_condition(groups: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The values over all prompts, with those by condition under "conditions"."""
    return {
        **groups[ALL],
        "conditions": {name: values for name, values in groups.items() if name != ALL},
    }


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
