"""What is wrong with a reward model, in sentences with numbers, from its report card alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.evaluation.report_card.measures import Accuracy, Difference

if TYPE_CHECKING:
    from tuner.evaluation.report_card.card import Control, ReportCard

CHANCE = 0.5
WIDE = 0.2
"""An interval wider than this is too wide to judge by: about 96 rows at an accuracy of one half, 30 at 0.95."""
SAME_WINNERS = 0.01
"""Below this share of changed winners, another condition's wording counts as changing nothing."""
MOST_OUTSIDE = 0.01
"""Largest share of scores outside the bounds that is not reported."""
MOST_ECE = 0.1
"""Largest expected calibration error that is not reported."""
EXACT = 1e-9
"""Rounding allowed where an interval's end is compared with a limit."""


def assess(card: ReportCard) -> tuple[tuple[str, ...], bool]:
    """(sentences, whether the model fails), failures first.

    It fails where scores are no better than chance or than choosing by length, ignore the conditions, or are not
    finite. Too few rows for a judgment are mentioned and fail nothing.
    """
    failures = [*_broken(card), *_chance(card), *_length(card), *_conditions(card)]
    notes = [*_too_few(card), *_single_conditions(card), *_outside(card), *_calibration(card)]
    return tuple(failures + notes), bool(failures)


def _broken(card: ReportCard) -> list[str]:
    if not card.broken:
        return []
    return [
        f"Scores are not numbers: {_number(card.broken, 'pair')} with an infinite or undefined score left out."
    ]


def _too_few(card: ReportCard) -> list[str]:
    if card.overall is None:
        return ["Too few rows to tell: there is no held-out pair."]
    if _wide(card.overall.accuracy):
        return [f"Too few rows to tell how good it is: {_accuracy(card.overall.accuracy)}."]
    length, controls, sentences = card.length, card.controls, []
    if length is not None and not _above(length.gain.low, 0) and _wide(length.gain):
        rule = f"choosing the {length.rule} answer"
        sentences.append(
            f"Too few rows to tell whether it is better than {rule}: {_difference(length.gain)}."
        )
    if controls is not None and controls.over == "twins":
        right = controls.rows[0].accuracy
        if _wide(right) and not _above(right.low, CHANCE):
            sentences.append(f"Too few twins to tell whether conditions are heeded: {_accuracy(right)}.")
    return sentences


def _chance(card: ReportCard) -> list[str]:
    right = card.overall.accuracy if card.overall else None
    if right is None or _above(right.low, CHANCE) or _wide(right):
        return []
    if _above(CHANCE, right.high):
        return [f"Reversed: the worse answer has the higher score more often than not: {_accuracy(right)}."]
    return [f"No better than chance: {_accuracy(right)}."]


def _length(card: ReportCard) -> list[str]:
    length = card.length
    if length is None or card.overall is None or _above(length.gain.low, 0) or _wide(length.gain):
        return []
    rule = length.longer_wins.value if length.rule == "longer" else 1 - length.longer_wins.value
    return [
        f"No better than choosing the {length.rule} answer: accuracy {card.overall.accuracy.value:.3f}, "
        f"that rule {rule:.3f} on the same pairs ({_difference(length.gain)})."
    ]


def _conditions(card: ReportCard) -> list[str]:
    """Whether conditions are ignored.

    Twins show it by their accuracy, of which half is chance. Without twins a control may rightly be as accurate, so
    only a model that chooses the same winners under another condition counts as ignoring conditions.
    """
    controls = card.controls
    if controls is None or controls.over == "all":
        return []
    seen = controls.rows[0]
    swapped = next((control for control in controls.rows if control.name == "swapped"), None)
    if controls.over == "twins":
        return _on_twins(seen, swapped)
    changed = swapped.changed if swapped else None
    # With fewer than 100 pairs a share below 1% is none at all, which may be chance.
    if changed is None or changed >= SAME_WINNERS or seen.accuracy.pairs * SAME_WINNERS < 1:
        return []
    return [
        "Conditions are ignored: another condition's wording changes the winner of only "
        f"{changed:.1%} of {_number(seen.accuracy.pairs, 'pair')}."
    ]


def _on_twins(seen: Control, swapped: Control | None) -> list[str]:
    if not _above(seen.accuracy.low, CHANCE):
        if _wide(seen.accuracy):
            return []
        if _above(CHANCE, seen.accuracy.high):
            return [
                f"Conditions are reversed: on rows with a twin, {_accuracy(seen.accuracy)}; without any condition it "
                "would be 0.500."
            ]
        return [
            f"Conditions are ignored: on rows with a twin, {_accuracy(seen.accuracy)}; without any condition "
            "it would be 0.500."
        ]
    gain = swapped.gain if swapped else None
    if swapped is None or gain is None or _above(gain.low, 0) or _wide(gain):
        return []
    return [
        f"Conditions are ignored: on rows with a twin, accuracy {seen.accuracy.value:.3f} becomes "
        f"{swapped.accuracy.value:.3f} under another condition's wording ({_difference(gain)})."
    ]


def _single_conditions(card: ReportCard) -> list[str]:
    return [
        f"Condition {group.name} is {_against_chance(group.accuracy)}: {_accuracy(group.accuracy)}."
        for group in card.conditions
        if not _above(group.accuracy.low, CHANCE) and not _wide(group.accuracy)
    ]


def _outside(card: ReportCard) -> list[str]:
    scores = card.scores
    if scores is None or scores.outside is None or scores.outside <= MOST_OUTSIDE:
        return []
    return [f"Scores leave the bounds: {scores.outside:.1%} lie outside ±{scores.bound:g}."]


def _calibration(card: ReportCard) -> list[str]:
    if card.overall is None or _wide(card.overall.accuracy) or card.overall.calibration.ece <= MOST_ECE:
        return []
    right, calibrated = card.overall.accuracy, card.overall.calibration
    way = "over-confident" if calibrated.confidence > right.value else "under-confident"
    return [
        f"Badly calibrated ({way}): mean confidence {calibrated.confidence:.3f}, accuracy {right.value:.3f}, "
        f"expected calibration error {calibrated.ece:.3f}."
    ]


def _against_chance(right: Accuracy) -> str:
    """What an accuracy that is not above chance is: significantly below it, a model ranks the other way round."""
    return "reversed" if _above(CHANCE, right.high) else "no better than chance"


def _above(low: float, limit: float) -> bool:
    return low > limit + EXACT


def _wide(interval: Accuracy | Difference) -> bool:
    return interval.high - interval.low > WIDE


def _accuracy(right: Accuracy) -> str:
    rows = _number(right.rows, "row")
    return f"accuracy {right.value:.3f} on {rows}, 95% interval {right.low:.3f} to {right.high:.3f}"


def _difference(gain: Difference) -> str:
    text = f"difference {gain.value:+.3f}, 95% interval {gain.low:+.3f} to {gain.high:+.3f}"
    return text.replace("-", "−")


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
