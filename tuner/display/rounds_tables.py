"""The tables of a run in rounds, and what they say in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from tuner.display.round_facts import LabelFacts, PatchFacts, RoundFacts, RunInRounds
from tuner.display.sheet import minus
from tuner.evaluation.intervals import Interval
from tuner.evaluation.report_card.card import Ranking
from tuner.evaluation.report_card.tables import Table

Kind = Literal["good", "remarks", "failed"]

_MEASURES = {"gold": "gold score", "score": "score", "replay": "replay loss"}
"""Name in results.json -> name in a table."""
_FIGURES = {
    "labels": "labels",
    "ties": "ties",
    "skips": "skips",
    "unsure": "unsure",
    "left": "left",
    "self_agreement": "same again",
    "gold_accuracy": "right on planted",
    "median_seconds": "seconds",
}
"""Figure of an annotator's labels -> name in a table."""
_KINDS: tuple[Kind, ...] = ("failed", "remarks", "good")
"""The first that any change is counts."""
_GOLD_CHANGES: Mapping[str, set[Kind]] = {"higher": {"good"}, "lower": {"failed"}}
_PATTERN_CHANGES: Mapping[str, set[Kind]] = {"higher": {"remarks"}, "lower": {"good"}}
_CARRIED = {"higher": "more", "lower": "fewer"}
"""A change of the share of answers, in words."""
_SHARES = ("left", "self_agreement", "gold_accuracy")


def verdict(run: RunInRounds) -> tuple[Kind, list[str]]:
    """What every round changed, in sentences, and whether that is good."""
    sentences: list[str] = []
    changes: set[Kind] = set()
    for before, now in pairwise(run.rounds):
        sentences.append(f"round {now.number}: {_patch_sentence(now.patch)}")
        if now.patch is not None and now.patch.costs:
            changes.add("remarks")
        for name, share, then in _pattern_shares(before, now):
            sentences.append(_pattern_sentence(name, before, now, share, then))
            changes |= _PATTERN_CHANGES.get(_change(share, then), set())
        gold, then = before.gold_at_end, now.gold_at_end
        if gold is not None and then is not None:
            sentences.append(_gold_sentence(before, now, gold, then))
            changes |= _GOLD_CHANGES.get(_change(gold, then), set())
    kinds: list[Kind] = sorted(changes, key=_KINDS.index)
    return kinds[0] if kinds else "remarks", sentences


def rounds_table(run: RunInRounds) -> Table:
    """The rounds side by side, a column each."""
    names = list(dict.fromkeys(name for place in run.rounds for name in place.measures))
    patterns = list(dict.fromkeys(name for place in run.rounds for name in place.shares_at_end))
    rows: list[list[Any]] = [["steps", *(f"{place.steps:,}" for place in run.rounds)]]
    rows += [
        [f"{_MEASURES.get(name, name)}, before → after", *(_measure(place, name) for place in run.rounds)]
        for name in names
    ]
    rows.append(["gold score of the last answers", *(_interval(place.gold_at_end) for place in run.rounds)])
    rows.append(["KL, nats per token", *(_number(place.kl) for place in run.rounds)])
    rows.append(["gold score turns at √KL, by its own law", *(_turn(place) for place in run.rounds)])
    rows.append(["√KL reached", *(_reached(place) for place in run.rounds)])
    rows += [
        [f"last answers with {name}", *(_share(place.shares_at_end.get(name)) for place in run.rounds)]
        for name in patterns
    ]
    rows.append(["reward model", *(_patch_state(place.patch) for place in run.rounds)])
    rows.append(["pairs, of them decided", *(_pairs(place.labels) for place in run.rounds)])
    rows.append(["agreement (alpha)", *(_alpha(place.labels) for place in run.rounds)])
    head = ["", *(f"round {place.number}" for place in run.rounds)]
    return head, [_without_gaps(row) for row in rows if any(value is not None for value in row[1:])]


def patch_table(patch: PatchFacts) -> Table:
    """How the reward model ranks held-out rows before and after a patch."""
    groups = {**patch.original_rows, **{f"labels of {name}": pair for name, pair in patch.patterns.items()}}
    rows = [[name, before.rows, *_rankings(before, after)] for name, (before, after) in groups.items()]
    return ["held-out rows", "rows", "accuracy before", "after", "margin before", "after"], rows


def patterns_table(run: RunInRounds) -> Table:
    """Every pattern: where it was seen, and how many of the last answers of that round and of the next carry it."""
    rows: list[list[Any]] = []
    for before, now in zip(run.rounds, [*run.rounds[1:], None], strict=True):
        shares = {} if now is None else {name: then for name, _, then in _pattern_shares(before, now)}
        for pattern in before.patterns:
            at_end, then = before.shares_at_end.get(pattern.name), shares.get(pattern.name)
            change = None if at_end is None or then is None else _change(at_end, then)
            seen = [f"{share:.0%}" for share in (pattern.share_before, pattern.share_of_best)]
            words = None if change is None else _CARRIED.get(change, change)
            shown = [pattern.name, str(before.number), *seen, _share(at_end), _share(then), words]
            rows.append(_without_gaps(shown))
    return ["pattern", "round", "first", "best-scored", "last answers", "of the next round", "carry it"], rows


def labels_table(run: RunInRounds) -> Table:
    """Figures of every annotator, over all conditions and by condition; without columns that are empty throughout."""
    rows: list[list[Any]] = []
    for place, labels in _labeled(run):
        groups = labels.report["groups"]
        conditions = {group["condition"] for group in groups} - {None}
        for group in groups:
            if group["labels"] and (group["condition"] is None or len(conditions) > 1):
                figures = [_figure(name, group[name]) for name in _FIGURES]
                who = [str(place.number), group["annotator"] or "all", group["condition"] or "all"]
                rows.append([*who, *figures, _group_alpha(group)])
    return _without_empty(["round", "annotator", "condition", *_FIGURES.values(), "alpha"], rows)


def kappas_table(run: RunInRounds) -> Table:
    """Cohen's kappa of every two annotators who decided the same pairs."""
    rows = [
        [
            str(place.number),
            " and ".join(two["annotators"]),
            two["condition"] or "all",
            two["items"],
            two["kappa"],
        ]
        for place, labels in _labeled(run)
        for two in labels.report["pairs"]
        if two["items"]
    ]
    return ["round", "annotators", "condition", "pairs", "kappa"], rows


def labels_sentences(run: RunInRounds) -> list[str]:
    """How many pairs the labels of each round decide, and why not the others."""
    sentences: list[str] = []
    for place, labels in _labeled(run):
        reasons = (f"{reason} {count:,}" for reason, count in labels.left_out.items() if count)
        sentence = f"round {place.number}: labels decide {labels.usable:,} of {labels.pairs:,} pairs"
        sentences.append("; ".join([sentence, *reasons]))
    return sentences


def patch_note(patch: PatchFacts) -> str:
    """What a patch was trained on, and what became of it."""
    rows = f"{patch.labels:,} labels beside {patch.original:,} original rows"
    if patch.costs:
        return f"{rows}; not taken: {'; '.join(patch.costs)}"
    return rows if patch.share == 1 else f"{rows}; taken as an average with {patch.share:g} of its weights"


def _labeled(run: RunInRounds) -> Iterator[tuple[RoundFacts, LabelFacts]]:
    return ((place, place.labels) for place in run.rounds if place.labels is not None)


def _patch_sentence(patch: PatchFacts | None) -> str:
    if patch is None:
        return "no label decided a pair, so the reward model is that of the round before"
    ranking = next(iter(patch.original_rows.values()), None)
    kept = "" if ranking is None else f"; accuracy on original rows {_accuracies(*ranking)}"
    return f"the reward model was patched with {patch_note(patch)}{kept}"


def _pattern_shares(before: RoundFacts, now: RoundFacts) -> Iterator[tuple[str, Interval, Interval]]:
    """(name, share of the last answers then, share in the round after) of the patterns that a round came to."""
    for pattern in before.patterns:
        shares = before.shares_at_end.get(pattern.name), now.shares_at_end.get(pattern.name)
        if shares[0] is not None and shares[1] is not None:
            yield pattern.name, shares[0], shares[1]


def _pattern_sentence(name: str, before: RoundFacts, now: RoundFacts, share: Interval, then: Interval) -> str:
    change = _change(share, then)
    return (
        f"round {now.number}: {_share(then)} of the last answers carry {name}, in round {before.number} "
        f"{_share(share)}: {_CARRIED.get(change, change)}"
    )


def _gold_sentence(before: RoundFacts, now: RoundFacts, gold: Interval, then: Interval) -> str:
    return (
        f"round {now.number}: the gold score of the last answers is {_interval(then)}, in round {before.number} "
        f"{_interval(gold)}: {_change(gold, then)}"
    )


def _change(before: Interval, now: Interval) -> str:
    """Whether 95% intervals tell two values apart."""
    return "higher" if now.low > before.high else "lower" if now.high < before.low else "not told apart"


def _measure(place: RoundFacts, name: str) -> str | None:
    values = place.measures.get(name)
    return values and " → ".join(_number(value) or "–" for value in values)


def _rankings(before: Ranking, after: Ranking) -> list[float]:
    return [before.accuracy, after.accuracy, before.margin, after.margin]


def _accuracies(before: Ranking, after: Ranking) -> str:
    return f"{before.accuracy:.3f} before and {after.accuracy:.3f} after"


def _patch_state(patch: PatchFacts | None) -> str:
    if patch is None:
        return "not patched"
    if patch.costs:
        return "rolled back"
    return "patched" if patch.share == 1 else f"average, {patch.share:g} patched"


def _pairs(labels: LabelFacts | None) -> str | None:
    return labels and f"{labels.pairs:,}, {labels.usable:,}"


def _alpha(labels: LabelFacts | None) -> str | None:
    return labels and _group_alpha(labels.report["groups"][0])


def _group_alpha(group: Any) -> str | None:
    """Of a group of labels, with its interval; None where no two annotators decided the same pairs."""
    if group["alpha"] is None:
        return None
    bounds = (group["alpha_low"], group["alpha_high"])
    return minus(f"{group['alpha']:.2f}") + (
        "" if None in bounds else minus(f" [{bounds[0]:.2f}, {bounds[1]:.2f}]")
    )


def _figure(name: str, value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.0%}" if name in _SHARES else f"{value:.1f}" if name == "median_seconds" else f"{value:,}"


def _turn(place: RoundFacts) -> str | None:
    law = place.signs.law
    if law is None:
        return None
    turn = law.turning_point_of(place.number)
    return "no turning point" if turn is None else _interval(turn)


def _reached(place: RoundFacts) -> str | None:
    points = place.signs.points
    return f"{points[-1].distance:.2f}" if points else None


def _number(value: float | None) -> str | None:
    return None if value is None else minus(f"{value:.3f}")


def _interval(interval: Interval | None) -> str | None:
    return interval and minus(f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]")


def _share(share: Interval | None) -> str | None:
    return share and f"{share.value:.0%} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _without_empty(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """The table of texts without columns that have no value in any row."""
    kept = [column for column in range(len(names)) if any(row[column] is not None for row in rows)]
    return [names[column] for column in kept], [
        _without_gaps([row[column] for column in kept]) for row in rows
    ]


def _without_gaps(row: Sequence[Any]) -> list[Any]:
    """The texts of a row, a dash for None: a table has None on the right, where numbers are."""
    return ["–" if value is None else value for value in row]
