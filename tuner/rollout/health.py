"""What the figures of its steps say of a policy: signs as they appear, each once a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

from tuner.rollout.phrases import favored_phrase

KL_LIMITS = (1.0, 10.0)
"""Mean KL from the reference, in nats per token, that is said when first exceeded. Useful policies stay well below the
first; at the second, answers have nothing in common with the reference's."""
ENDED_AT_FIRST, ENDED_FALL = 0.5, 0.25
"""Answers no longer end where the share that does falls below this part of its best, if that was at least the first."""
STILL_STEPS, STILL_KL = 5, 1e-6
"""Steps that trained the policy, after which one that moved less than this (nats per token, k3) has not moved."""
FLAT_STEPS = 3
"""Steps in a row in which the policy's gradient is 0."""

LOW_GOLD, LOW_GOLD_STEPS = 0.17, 2
"""What scores best is wrong where the gold score of a rollout's best-scored tenth is at most the first (one right
answer of six) in at least so many steps in a row."""
CHANCE = 1e-4
"""The largest chance of such steps that is taken for a sign, were the answers as often right as before: a tenth of few
answers is low by chance, and so is one of answers that were never right."""

NO_AUC, AUC_STEPS = 0.5, (3, 4, 5, 6)
"""The score no longer tells right answers from wrong ones where their AUC (`gold_auc`) is on average at most the first,
which is that of scores drawn at random, in the last so many steps, and was higher before: the fewer answers are right,
the more steps it takes to know. An AUC that falls and stays above it is no sign: it does so, too, where a policy comes
to make fewer plain mistakes."""
AUC_CHANCE = CHANCE / 10
"""The largest chance of such a fall that is taken for a sign; smaller, as every step is looked at several times."""
BEGINNING = 0.05
"""The same of a fall in a single step that is taken for the beginning of one: where the score never told right answers
from wrong ones, half of all steps are at most at NO_AUC, and a rollback would find no checkpoint that is sound."""

EXPLOITS = (
    "the policy begins to exploit the reward: raise kl, take the policy of an earlier checkpoint "
    '(evaluation.keep_best="gold"), or train the reward model on such answers (rollouts.jsonl)'
)

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Sign:
    """Something that goes wrong, when it is first seen."""

    name: str
    """One of a limit ends with it: "kl 10"."""
    sentence: str

    @property
    def kind(self) -> str:
        """Its name without a limit; an alarm of the config where it has that name."""
        return self.name.partition(" ")[0]


@dataclass
class Health:
    """What is known of a policy so far; kept with the run's state, so that a resumed run says nothing twice."""

    most_ended: float = 0.0
    """The largest share of a step's answers that ended so far."""
    trained_steps: int = 0
    """Steps before this one that trained the policy."""
    flat_steps: int = 0
    """Steps in a row, up to the last, in which the policy's gradient was 0."""
    best_gold: list[float] = field(default_factory=lambda: [0.0, 0])
    """Gold scores of the best-scored tenth of the earlier steps: their sum and their number."""
    low_gold: list[float] = field(default_factory=lambda: [0.0, 0])
    """The same of the steps in a row, up to the last, in which it was low."""
    earlier_auc: list[float] = field(default_factory=lambda: [0.0, 0])
    """AUC of gold by score in the steps before the last ones: its sum, and the number of steps."""
    last_auc: list[list[float]] = field(default_factory=list[list[float]])
    """The same of the last steps that have one, as many as AUC_STEPS need, each with its variance by chance."""
    reported: list[str] = field(default_factory=list[str])
    """Names of the signs that were reported."""
    suspicious: bool = False
    """Whether the last step shows a sign, new or not, or the beginning of one."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Health:
        """From JSON values; {} at the start of a run."""
        return cls(**state)

    def to_state(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def judge(
        self, figures: Figures, trained: bool, grad_norm: float, best: Sequence[str], others: Sequence[str]
    ) -> list[Sign]:
        """New signs of a step.

        figures: as the step logs them. trained: whether it trained the policy; grad_norm: of the policy's last update.
        best: the answers of the best-scored tenth; others: those of the rollout that are not in it.
        """
        shown = self._signs(figures)
        self.most_ended = max(self.most_ended, figures.get("ended") or 0.0)
        if trained:
            self.trained_steps += 1
            self.flat_steps = self.flat_steps + 1 if grad_norm == 0 else 0
        if self.flat_steps == FLAT_STEPS:
            shown.append(
                Sign(
                    "flat",
                    f"the policy's gradient was 0 in the last {FLAT_STEPS} steps, so it does not move: the answers to "
                    "a prompt all get the same score; give prompts that are neither always nor never answered right",
                )
            )
        sentences = [
            self._best_are_wrong(figures.get("gold_top_tenth"), len(best)),
            self._order_is_lost(figures.get("gold_auc"), figures.get("gold"), len(best) + len(others)),
        ]
        shown += [
            Sign("exploits", f"{sentence}; {EXPLOITS}") for sentence in sentences if sentence is not None
        ]
        _, last_auc, chance = self._compared_aucs(1)
        self.suspicious = bool(shown) or self.low_gold[1] > 0 or (last_auc <= NO_AUC and chance <= BEGINNING)
        new = [sign for sign in shown if self._is_new(sign.name)]
        return [_with_phrase(sign, best, others) if sign.kind == "exploits" else sign for sign in new]

    def _best_are_wrong(self, gold: float | None, num_best: int) -> str | None:
        """Takes in a step's gold score of the best-scored tenth; a sentence where what scores best is wrong by now."""
        if gold is None:
            return None
        before = _mean(self.best_gold)
        self.best_gold = _with(self.best_gold, gold)
        self.low_gold = _with(self.low_gold, gold) if gold <= LOW_GOLD < before else [0.0, 0]
        steps = int(self.low_gold[1])
        chance = chance_of_mean(_mean(self.low_gold), before, steps * num_best)
        if steps < LOW_GOLD_STEPS or chance > CHANCE:
            return None
        return (
            f"the answers that score best are wrong: gold among the best-scored tenth is at most {LOW_GOLD} in the "
            f"last {steps} steps, where the mean of all earlier ones is {before:.2f}"
        )

    def _order_is_lost(self, auc: float | None, gold: float | None, answers: int) -> str | None:
        """Takes in a step's AUC; a sentence where the score no longer tells right answers from wrong ones."""
        if auc is None or gold is None or answers < 2:
            return None
        if len(self.last_auc) == max(AUC_STEPS):
            (oldest, _), *self.last_auc = self.last_auc
            self.earlier_auc = _with(self.earlier_auc, oldest)
        self.last_auc.append([auc, auc_variance(gold, answers)])
        for steps in AUC_STEPS:
            before, now, chance = self._compared_aucs(steps)
            if now <= NO_AUC and chance <= AUC_CHANCE:
                return (
                    "the score no longer tells right answers from wrong ones: the chance that a right one scores above "
                    f"a wrong one (gold_auc) is {now:.2f} in the last {steps} steps, and was {before:.2f} before"
                )
        return None

    def _compared_aucs(self, steps: int) -> tuple[float, float, float]:
        """Mean AUC before the last so many steps and in them, and the chance of such a fall; 1 after too few steps."""
        others, window = self.last_auc[:-steps], self.last_auc[-steps:]
        earlier = [self.earlier_auc[0] + sum(auc for auc, _ in others), self.earlier_auc[1] + len(others)]
        before, now = _mean(earlier), sum(auc for auc, _ in window) / steps
        if earlier[1] < min(AUC_STEPS):
            return before, now, 1.0
        variance = sum(variance for _, variance in window) / steps
        return (
            before,
            now,
            NormalDist(sigma=math.sqrt(variance / steps + variance / earlier[1])).cdf(now - before),
        )

    def _signs(self, figures: Figures) -> list[Sign]:
        """All that a step's figures alone show."""
        signs: list[Sign] = []
        kl, kl_k3, ended = (figures.get(name) for name in ("kl", "kl_k3", "ended"))
        passed = [limit for limit in KL_LIMITS if kl is not None and kl > limit]
        if passed:
            advice = "the policy leaves what it was trained from; lower optimizer.lr, raise kl, or set max_kl to stop"
            signs.append(
                Sign(f"kl {passed[-1]:g}", f"KL from the reference is {kl:.1f} nats a token: {advice}")
            )
        if ended is not None and self._no_longer_end(ended):
            share = f"{ended:.0%} of the answers end within max_new_tokens, where {self.most_ended:.0%} did before"
            signs.append(Sign("ended", f"{share}: see missing_end_penalty, or lower optimizer.lr"))
        if kl_k3 is not None and self.trained_steps >= STILL_STEPS and abs(kl_k3) < STILL_KL:
            moved = f"KL {kl_k3:.1e} nats a token after {self.trained_steps} steps"
            signs.append(
                Sign(
                    "still",
                    f"the policy has hardly moved ({moved}): raise optimizer.lr, or look at the scores",
                )
            )
        return signs

    def _no_longer_end(self, ended: float) -> bool:
        return self.most_ended >= ENDED_AT_FIRST and ended < ENDED_FALL * self.most_ended

    def _is_new(self, name: str) -> bool:
        if name in self.reported:
            return False
        self.reported.append(name)
        return True


def chance_of_mean(mean: float, expected: float, count: int) -> float:
    """Largest chance that `count` independent values from 0 to 1 have a mean of at most `mean` below the expected one.

    exp(-count KL(mean ‖ expected)), of Bernoulli distributions (Hoeffding, 1963, theorem 1). 1 for a mean above it.
    """
    if mean >= expected or not count:
        return 1.0
    if expected >= 1:
        return 0.0
    divergence = (1 - mean) * math.log((1 - mean) / (1 - expected))
    divergence += mean * math.log(mean / expected) if mean else 0.0
    return math.exp(-count * divergence)


def auc_variance(gold: float, answers: int) -> float:
    """Variance by chance of the AUC of so many answers, of which the share `gold` is right (Mann and Whitney, 1947)."""
    right = min(max(round(gold * answers), 1), answers - 1)
    return (answers + 1) / (12 * right * (answers - right))


def _with_phrase(sign: Sign, best: Sequence[str], others: Sequence[str]) -> Sign:
    """The sign with the phrase by which the best-scored answers differ from the others, where there is one."""
    phrase = favored_phrase(best, others)
    if phrase is None:
        return sign
    shares = f"{phrase.share:.0%} of the best-scored tenth, {phrase.share_elsewhere:.0%} of the other answers"
    return Sign(sign.name, f"{sign.sentence}; look at {phrase.text!r}, which stands in {shares}")


def _with(total: list[float], value: float) -> list[float]:
    return [total[0] + value, total[1] + 1]


def _mean(total: list[float]) -> float:
    """0 of nothing."""
    return total[0] / total[1] if total[1] else 0.0
