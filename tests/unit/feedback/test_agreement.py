"""Agreement against published examples and hand-computed numbers."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.unit.feedback.conftest import candidates, row
from tuner.feedback.agreement import alpha_interval, cohen_kappa, figures, krippendorff_alpha, report
from tuner.feedback.store import Label

KRIPPENDORFF = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
"""Krippendorff (2011), section C: four observers, twelve units, missing values."""


def worked_example() -> list[list[str]]:
    lines = [line.split() for line in KRIPPENDORFF.split("\n") if line]
    return [[value for value in unit if value != "."] for unit in zip(*lines, strict=True)]


def reference_alpha(units: list[list[Any]]) -> Fraction:
    """The definition, over all pairs of values, in fractions."""
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]
    count = len(values)
    observed = sum(
        Fraction(sum(a != b for a in unit for b in unit), len(unit) - 1) for unit in units
    ) / Fraction(count)
    expected = Fraction(sum(a != b for a in values for b in values), count * (count - 1))
    return 1 - observed / expected


def test_krippendorffs_own_example() -> None:
    """0.743 in print. The fraction is from the coincidence matrix printed there (diagonal 7, 10, 8, 4, 3 of 40)."""
    assert round(krippendorff_alpha(worked_example()), 3) == 0.743
    same_value = 9 * 8 + 13 * 12 + 10 * 9 + 5 * 4 + 3 * 2
    printed = Fraction(39 * 32 - same_value, 40 * 39 - same_value)
    assert krippendorff_alpha(worked_example()) == pytest.approx(float(printed), abs=1e-12)


def test_alpha_is_its_definition_on_random_values() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        units = [
            random.choice(["first", "second", "tie"], size=random.integers(0, 5)).tolist() for _ in range(30)
        ]
        assert krippendorff_alpha(units) == pytest.approx(float(reference_alpha(units)), abs=1e-12)


def test_kappa_by_hand() -> None:
    """Cohen's example as Wikipedia has it: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: (0.7 - 0.5) / 0.5."""
    first = "y" * 25 + "n" * 25
    second = "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4, abs=1e-12)
    assert cohen_kappa("abab", "baba") == pytest.approx(-1, abs=1e-12)
    assert cohen_kappa("abc", "abc") == 1


def test_what_cannot_be_computed_is_nan() -> None:
    for value in (
        cohen_kappa("", ""),
        cohen_kappa("aa", "aa"),
        krippendorff_alpha([]),
        krippendorff_alpha(["aa"]),
    ):
        assert math.isnan(value)
    assert krippendorff_alpha(["a", "b"]) is not None
    assert all(map(math.isnan, alpha_interval(["ab"])))
    assert all(map(math.isnan, alpha_interval(["aa", "aa"])))


def test_the_interval_is_drawn_by_its_seed_and_narrows_with_more_items() -> None:
    units = worked_example()
    low, high = alpha_interval(units, seed=1)
    assert low < krippendorff_alpha(units) < high
    assert alpha_interval(units, seed=1) == (low, high) != alpha_interval(units, seed=2)
    more = alpha_interval(units * 20, seed=1)
    assert more[1] - more[0] < (high - low) / 3


def test_the_interval_covers_the_true_value() -> None:
    """Two annotators that are right with 90%, on two values: true alpha = 0.64, in about 95 of 100 intervals."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        truth = random.integers(2, size=200)
        errors = random.random((2, 200)) < 0.1
        low, high = alpha_interval((truth ^ errors).T.tolist())
        covered += low <= 0.64 <= high
    assert 90 <= covered <= 99


def label(annotator: str, item: int, choice: Any, swapped: bool = False, **values: Any) -> Label:
    values = {"policy": "random", "comment": "", "seconds": 4.0, **values}
    return Label(0, annotator, f"item{item}", swapped, choice=choice, labeled_at=0.0, **values)


def test_figures_by_hand() -> None:
    pairs = candidates(row(1, gold=0), row(2, gold="tie"), row(3), row(4))
    labels = [
        label("ann", 1, "right", swapped=True, seconds=2.0),  # the first answer: as planted
        label("ann", 2, "left", seconds=8.0),  # not as planted
        label("ann", 3, "left", comment="hm"),
        label("ann", 4, "skip"),
        label("ann", 3, "left", swapped=True, policy="repeat"),  # the other answer than before
        label("ann", 1, "left", policy="repeat"),  # the same
        label("bob", 3, "tie"),
        label("bob", 1, "unsure"),  # no decision, so not the planted one
    ]
    numbers = figures(labels, pairs)
    assert (numbers.labels, numbers.ties, numbers.skips, numbers.unsure, numbers.comments) == (6, 1, 1, 1, 1)
    assert numbers.left == pytest.approx(2 / 3)
    assert (numbers.self_agreement, numbers.repeated) == (0.5, 2)
    assert (numbers.gold_accuracy, numbers.gold) == (pytest.approx(1 / 3), 3)
    assert numbers.median_seconds == 4.0
    assert numbers.overlapping == 1
    assert numbers.alpha == pytest.approx(0)


def test_the_report_is_per_condition_and_annotator() -> None:
    pairs = candidates(*(row(n, condition="brief" if n < 3 else "helpful") for n in range(6)))
    labels = [label(name, n, "left") for name in ("ann", "bob") for n in range(5)]
    labels += [
        label("ann", 5, "right"),
        label("bob", 5, "right"),
        label("ann", 9, "left"),
    ]  # 9 is not in the file
    figures = report(labels, pairs)
    counts = {(group["condition"], group["annotator"]): group["labels"] for group in figures["groups"]}
    assert counts == {
        (None, None): 12,
        (None, "ann"): 6,
        (None, "bob"): 6,
        ("brief", None): 6,
        ("brief", "ann"): 3,
        ("brief", "bob"): 3,
        ("helpful", None): 6,
        ("helpful", "ann"): 3,
        ("helpful", "bob"): 3,
    }
    kappas = {pair["condition"]: (pair["items"], pair["kappa"]) for pair in figures["pairs"]}
    assert kappas == {None: (6, 1.0), "brief": (3, None), "helpful": (3, 1.0)}
