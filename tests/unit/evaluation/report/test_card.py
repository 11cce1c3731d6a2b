"""The report card of a reward model: every measure by hand, every sentence of its verdict said and not said."""

import json
import math

import numpy as np
import pytest

from tuner.evaluation.report_card.card import ReportCard, make_card
from tuner.evaluation.report_card.measures import (
    accuracy,
    calibration,
    difference,
    quantile_bins,
    twins_right,
)
from tuner.evaluation.report_card.pairs import PairText, ScoredPairs
from tuner.evaluation.report_card.tables import results, tables
from tuner.rollout.correlation import pearson, spearman


def make_pairs(margins, **fields) -> ScoredPairs:
    """Pairs with these margins, each a row of its own, scores around 0, answers of 10 tokens."""
    margins = np.asarray(margins, dtype=np.float64)
    count = len(margins)
    values = {
        "chosen": margins / 2,
        "rejected": -margins / 2,
        "weights": np.ones(count),
        "rows": np.arange(count),
        "conditions": ("",) * count,
        "sources": ("test.jsonl",) * count,
        "chosen_tokens": np.full(count, 10),
        "rejected_tokens": np.full(count, 10),
        "positions": np.full(count, 50),
        "cut": np.zeros(count, dtype=bool),
        "twins": np.full(count, -1),
    } | {name: value if isinstance(value, tuple) else np.asarray(value) for name, value in fields.items()}
    return ScoredPairs(**values)


NINE = math.log(9)
"""The margin at which P = 0.9."""


def signs(right: int, wrong: int) -> np.ndarray:
    return np.array([1.0] * right + [-1.0] * wrong)


def plain(right: int, wrong: int, **fields) -> ScoredPairs:
    return make_pairs(NINE * signs(right, wrong), **fields)


def twin_pairs(groups, **fields) -> ScoredPairs:
    """Groups of two: [(margin, margin), ...]; conditions brief and long, whose better answers are the other one."""
    count = len(groups)
    short_first = {"chosen_tokens": np.tile([8, 20], count), "rejected_tokens": np.tile([20, 8], count)}
    conditions, twins = ("brief", "long") * count, np.repeat(np.arange(count), 2)
    return make_pairs(np.ravel(groups), **({"conditions": conditions, "twins": twins} | short_first | fields))


GOOD = [(NINE, NINE)] * 90 + [(NINE, -NINE)] * 10 + [(-NINE, NINE)] * 10
"""Of 220 rows 200 are right (0.909), with a confidence of 0.9; of 110 groups 90."""
BLANK = [(NINE, -NINE)] * 110


def card_of(seen, controls=None, **fields) -> ReportCard:
    return make_card(seen, controls or {}, **({"bound": 5.0} | fields))


# Accuracy and its interval


def test_accuracy_counts_a_prompt_once_and_half_of_a_tie():
    pairs = make_pairs([2.0, -1.0, 0.0], weights=[1.0, 0.5, 0.5], rows=[0, 1, 1])
    # (1 · 1 + 0.5 · 0 + 0.5 · 0.5) / 2
    right = accuracy(pairs)
    assert right.value == pytest.approx(0.625)
    assert (right.rows, right.pairs) == (2, 3)
    assert accuracy(pairs.select(np.zeros(3, dtype=bool))) is None


# Wilson's interval of 8 in 10: centre (0.8 + 1.9208/10) / (1 + 3.8415/10) = 0.71672,
# half width 1.95996 / 1.38415 · sqrt(0.8 · 0.2 / 10 + 3.8415 / 400) = 0.22656
EIGHT_IN_TEN = (0.49016, 0.94332)


def test_rows_alone_have_wilsons_interval():
    right = accuracy(make_pairs(signs(8, 2)))
    assert (right.low, right.high) == pytest.approx(EIGHT_IN_TEN, abs=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "rows": np.repeat(np.arange(10), 3),
            "weights": np.full(30, 1 / 3),
        },  # lists: three pairs of each row
        {"twins": np.repeat(np.arange(10), 3)},  # twins that are always right or wrong together
        {"rows": np.repeat(np.arange(10), 3), "weights": np.full(30, 1 / 3), "twins": np.arange(30) // 6},
    ],
    ids=["lists", "twins", "lists of twins"],
)
def test_pairs_that_belong_together_do_not_narrow_the_interval(fields):
    right = accuracy(make_pairs(np.repeat(signs(8, 2), 3), **fields))
    assert right.value == pytest.approx(0.8)
    assert right.high - right.low >= EIGHT_IN_TEN[1] - EIGHT_IN_TEN[0] - 1e-4
    if "twins" not in fields or "rows" not in fields:
        assert (right.low, right.high) == pytest.approx(EIGHT_IN_TEN, abs=1e-4)


def test_rows_are_joined_through_all_their_twins():
    # row 0 shares twin 5 with row 1, row 1 shares twin 6 with row 2; row 3 stands alone
    pairs = make_pairs(np.ones(6), rows=[2, 2, 1, 1, 0, 3], twins=[6, -1, 6, 5, 5, -1])
    clusters = pairs.clusters
    assert len(set(clusters[:5].tolist())) == 1
    assert clusters[5] != clusters[0]


def test_intervals_have_width_where_nothing_varies():
    right = accuracy(make_pairs(signs(10, 0)))
    # Wilson: 10 / (10 + 3.8415)
    assert (right.low, right.high) == pytest.approx((0.72247, 1.0), abs=1e-4)
    alone = accuracy(make_pairs([1.0, 1.0], rows=[0, 0], weights=[0.5, 0.5]))
    assert alone.low == pytest.approx(1 / (1 + 1.959964**2), abs=1e-4)
    joined = accuracy(twin_pairs([(1.0, 1.0)]))  # two rows, of which one tells as much
    assert joined.low == pytest.approx(1 / (1 + 1.959964**2), abs=1e-4)
    # without a condition twins are opposite, so the mean does not vary: as wide as 20 rows all the same
    blank = accuracy(twin_pairs([(1, -1)] * 10))
    assert (blank.low, blank.high) == pytest.approx((0.29930, 0.70070), abs=1e-4)


def test_difference_is_paired():
    pairs = make_pairs([1.0, 1.0, -1.0, 1.0])
    gain = difference(pairs, pairs.right, np.array([1.0, 0.0, 0.0, 0.0]))
    # gains 0, 1, 0, 1: mean 0.5, variance Σ 0.25 / 16 = 1/16, half width 1.95996 / 4
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.5, 0.5 - 0.48999, 0.5 + 0.48999), abs=1e-4)
    same = difference(pairs, pairs.right, pairs.right)
    assert (same.value, same.low, same.high) == (0, 0, 0)


# Calibration


def test_calibration_by_hand():
    # three pairs with P = 0.75, two of them right; one with P = 0.9, right:
    # 3/4 · |2/3 - 0.75| + 1/4 · |1 - 0.9| = 0.0875
    three = math.log(3)
    measured = calibration(make_pairs([three, three, -three, NINE]))
    assert measured.ece == pytest.approx(0.0875)
    assert measured.confidence == pytest.approx((3 * 0.75 + 0.9) / 4)
    low, high = measured.bins
    assert (low.right, low.confidence, low.share, low.pairs) == pytest.approx((2 / 3, 0.75, 0.75, 3))
    assert (high.right, high.confidence, high.share, high.pairs) == pytest.approx((1, 0.9, 0.25, 1))


def test_calibration_weighs_pairs_and_bears_extreme_margins():
    three = math.log(3)
    weighed = calibration(make_pairs([three, -three], weights=[3.0, 1.0]))
    assert weighed.ece == pytest.approx(0)  # 3 of 4 right at a confidence of 0.75
    extreme = calibration(make_pairs([1e4, 0.0]))
    assert extreme.ece == 0  # certain and right; a tie is 0.5 and half right
    assert [first.high for first in extreme.bins] == pytest.approx([0.55, 1.0])


# Twins


def test_twins_are_right_together():
    # right and right; right and tie (a tie is not right); right and wrong; a twin number that stands alone
    pairs = make_pairs([1, 1, 1, 0, 1, -1, 1], twins=[0, 0, 1, 1, 2, 2, 3])
    assert twins_right(pairs) == pytest.approx(1 / 3)
    assert twins_right(make_pairs([1.0, 1.0])) is None
    assert pairs.with_twin.tolist() == [True] * 6 + [False]


@pytest.mark.parametrize("seed", range(3))
def test_without_a_condition_half_of_the_twins_are_right(seed):
    generator = np.random.default_rng(seed)
    margins = generator.normal(size=30)
    seen = twin_pairs(generator.normal(size=(30, 2)))
    # a row without a twin does not count, however it is scored
    alone = {"conditions": (*seen.conditions, "brief"), "twins": [*seen.twins, -1]}
    card = card_of(
        make_pairs([*seen.margins, 1.0], **alone),
        {"blank": make_pairs([*np.ravel(np.stack([margins, -margins], axis=1)), 1.0], **alone)},
    )
    assert card.controls.over == "twins"
    assert card.controls.twin_groups == 30
    assert results(card)["blank"] == {"accuracy": 0.5, "twins": 0.0}


def test_controls_by_hand():
    seen = twin_pairs([(1, 1), (1, 1), (1, -1), (-1, -1)])  # 5 of 8, groups 2 of 4
    swapped = twin_pairs([(-1, -1), (1, -1), (1, -1), (0, -1)])  # 2.5 of 8, no group
    card = card_of(seen, {"swapped": swapped})
    seen, other = card.controls.rows
    assert (seen.name, seen.accuracy.value, seen.twins, seen.changed) == ("seen", 5 / 8, 0.5, None)
    assert (other.accuracy.value, other.twins, other.changed) == (2.5 / 8, 0, 4 / 8)
    assert other.gain.value == pytest.approx(2.5 / 8)
    assert {group.name: group.controls for group in card.conditions} == {
        "brief": {"swapped": 2.5 / 4},
        "long": {"swapped": 0.0},
    }


def test_controls_are_over_rows_with_a_condition_where_there_are_no_twins():
    seen = make_pairs([1.0, 1.0, -1.0], conditions=("math", "", "math"))
    assert card_of(seen).controls.over == "conditions"
    assert results(card_of(seen))["seen"] == {"accuracy": 0.5, "twins": None}
    assert card_of(make_pairs([1.0, -1.0])).controls.over == "all"


def test_mirrored_scores_have_mirrored_accuracy():
    generator = np.random.default_rng(0)
    pairs = make_pairs(generator.normal(size=50).round(), rows=np.arange(50) // 2, weights=np.full(50, 0.5))
    mirrored = make_pairs(-pairs.margins, rows=pairs.rows, weights=pairs.weights)
    first, other = accuracy(pairs), accuracy(mirrored)
    assert other.value == pytest.approx(1 - first.value)
    assert (other.low, other.high) == pytest.approx((1 - first.high, 1 - first.low))


# Length, position, truncation, scores


def test_correlations_by_hand():
    x, y, ones = np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 9, 16]), np.ones(4)
    # deviations -1.5, -0.5, 0.5, 1.5 and -6.5, -3.5, 1.5, 8.5: 25 / sqrt(5 · 129)
    assert pearson(x, y, ones) == pytest.approx(25 / math.sqrt(645))
    assert spearman(x, y, ones) == pytest.approx(1)
    # weighted ranks 1, 1, 3 and 0.5, 1.5, 3, both with mean 2: 4 / sqrt(4 · 4.5)
    assert spearman(x[[0, 0, 1]], y[:3], np.array([1.0, 1, 2])) == pytest.approx(4 / math.sqrt(18))
    assert pearson(ones, y, ones) is None
    assert spearman(x, ones, ones) is None


def test_length_by_hand():
    pairs = make_pairs(
        [1, -1, 1, 1, 1],
        chosen=[4.0, 1.0, 16.0, 4.0, 4.0],
        rejected=[1.0, 9.0, 1.0, 1.0, 0.0],
        chosen_tokens=[20, 10, 40, 100, 10],
        rejected_tokens=[10, 30, 10, 90, 10],
    )
    length = card_of(pairs, bound=None).length
    assert length.longer_wins.value == pytest.approx((1 + 0 + 1 + 1 + 0.5) / 5)
    assert length.rule == "longer"
    assert length.gain.value == pytest.approx((0 + 0 + 0 + 0 + 0.5) / 5)
    assert (length.controlled.pairs, length.controlled.value) == (2, 1)  # 100 and 90, 10 and 10
    assert (length.better_is_longer.pairs, length.better_is_longer.value) == (3, 1)
    assert (length.better_is_shorter.pairs, length.better_is_shorter.value) == (1, 0)
    tokens = np.array([20.0, 10, 40, 100, 10, 10, 30, 10, 90, 10])
    scores = np.array([4.0, 1, 16, 4, 4, 1, 9, 1, 1, 0])
    assert length.pearson == pytest.approx(np.corrcoef(tokens, scores)[0, 1])
    assert sum(first.answers for first in length.curve) == 10
    assert (length.curve[-1].tokens, length.curve[-1].score) == (95, 2.5)  # answers of 90 and 100 tokens


def test_lengths_within_ten_percent_are_controlled_and_no_more():
    pairs = make_pairs([1, 1, 1], chosen_tokens=[90, 89, 100], rejected_tokens=[100, 100, 90])
    assert card_of(pairs).length.controlled.pairs == 2


def test_quantile_bins_have_about_as_many_values_each():
    bins = quantile_bins(np.arange(1, 9), 4)
    assert [np.flatnonzero(inside).tolist() for inside in bins] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(quantile_bins(np.array([3, 3, 3, 9]), 4)) == 2
    assert quantile_bins(np.array([]), 4) == []


def test_position_and_truncation():
    pairs = make_pairs(signs(5, 3), positions=np.arange(10, 90, 10), cut=[1, 0, 0, 0, 0, 0, 0, 1])
    card = card_of(pairs)
    assert [(first.low, first.high, first.accuracy.value) for first in card.positions] == [
        (10, 20, 1.0),
        (30, 40, 1.0),
        (50, 60, 0.5),
        (70, 80, 0.0),
    ]
    assert (card.cut.value, card.cut.pairs) == (0.5, 2)
    assert (card.uncut.value, card.uncut.pairs) == (4 / 6, 6)


def test_scores_by_hand():
    pairs = make_pairs([0, 0, 0, 0], chosen=[0.0, 1.0, 2.0, 5.5], rejected=[-5.0, 5.0, -6.0, 0.0])
    scores = card_of(pairs).scores
    assert scores.outside == pytest.approx(2 / 8)  # 5.5 and -6; the bound itself is inside
    assert scores.better.mean == pytest.approx(8.5 / 4)
    # mean of squares (1 + 4 + 30.25) / 4 less the square of the mean
    assert scores.better.deviation == pytest.approx(math.sqrt(35.25 / 4 - 2.125**2))
    assert scores.better.quantiles[2] == pytest.approx(1.5)
    assert scores.worse.quantiles[0] == pytest.approx(
        -6 + 0.03
    )  # 3 % of the way from the first to the second
    assert sum(scores.better_counts) == sum(scores.worse_counts) == 4
    assert (scores.edges[0], scores.edges[-1]) == (-6, 5.5)
    assert card_of(pairs, bound=None).scores.outside is None


def test_worst_pairs_come_worst_first():
    pairs = make_pairs([1.0, -3.0, np.nan, -1.0, -5.0, 0.0])
    card = card_of(
        pairs, texts=lambda index: PairText(f"prompt {index}", "a", "b", "", f"file:{index}"), worst=2
    )
    assert [(first.index, first.margin, first.text.prompt) for first in card.worst] == [
        (4, -5.0, "prompt 4"),
        (1, -3.0, "prompt 1"),
    ]
    assert [first.index for first in card_of(pairs).worst] == [4, 1, 3]
    assert card_of(pairs).worst[0].text is None


def test_groups_by_condition_and_source():
    seen = make_pairs(
        [2.0, 0.0, -1.0, 3.0], conditions=("b", "a", "", "b"), sources=("x", "y", "x", "x"), rows=[0, 1, 2, 0]
    )
    card = card_of(seen)
    assert [(first.name, first.accuracy.value, first.margin) for first in card.conditions] == [
        ("(none)", 0.0, -1.0),
        ("a", 0.5, 0.0),
        ("b", 1.0, 2.5),
    ]
    assert [(first.name, first.accuracy.pairs, first.accuracy.rows) for first in card.sources] == [
        ("x", 3, 2),
        ("y", 1, 1),
    ]
    assert card.overall.margin == 1.0
    assert card_of(make_pairs([1.0])).conditions == ()


# The verdict


def sentence(card: ReportCard, begin: str) -> str | None:
    return next((first for first in card.verdict if first.startswith(begin)), None)


def test_nothing_is_said_of_a_good_model():
    swapped = twin_pairs([(-a, -b) for a, b in GOOD])
    card = card_of(twin_pairs(GOOD), {"swapped": swapped, "blank": twin_pairs(BLANK)})
    assert card.verdict == ()
    assert not card.failed


def test_chance_is_said():
    card = card_of(plain(105, 95))
    assert sentence(card, "No better than chance") == (
        "No better than chance: accuracy 0.525 on 200 rows, 95% interval 0.456 to 0.593."
    )
    assert card.failed
    assert not sentence(card_of(plain(120, 80)), "No better than chance")
    assert sentence(card_of(plain(90, 110)), "No better than chance")


def test_what_is_significantly_below_chance_is_reversed():
    card = card_of(plain(80, 120, conditions=("math",) * 200))
    assert sentence(
        card, "Reversed: the worse answer has the higher score more often than not: accuracy 0.400"
    )
    assert not sentence(card, "No better than chance")
    assert card.failed
    assert sentence(card, "Condition math is reversed: accuracy 0.400 on 200 rows")
    twins = card_of(twin_pairs([(-a, -b) for a, b in GOOD]))
    assert sentence(twins, "Conditions are reversed: on rows with a twin, accuracy 0.091")
    assert twins.failed


@pytest.mark.parametrize(("chosen", "rejected", "rule"), [(12, 10, "longer"), (10, 12, "shorter")])
def test_length_is_said(chosen, rejected, rule):
    all_but_ten = {
        "chosen_tokens": [chosen] * 190 + [rejected] * 10,
        "rejected_tokens": [rejected] * 190 + [chosen] * 10,
    }
    card = card_of(plain(180, 20, **all_but_ten))
    assert sentence(card, f"No better than choosing the {rule} answer: accuracy 0.900, that rule 0.950")
    assert card.failed
    assert not sentence(card_of(plain(200, 0, **all_but_ten)), "No better than choosing")


def test_ignored_conditions_are_said_of_twins():
    card = card_of(twin_pairs(BLANK))
    assert sentence(card, "Conditions are ignored: on rows with a twin, accuracy 0.500 on 220 rows")
    assert card.failed
    unchanged = card_of(twin_pairs(GOOD), {"swapped": twin_pairs(GOOD)})
    assert sentence(
        unchanged, "Conditions are ignored: on rows with a twin, accuracy 0.909 becomes 0.909 under"
    )
    assert unchanged.failed
    # other rows may hide it from the accuracy of all
    many = make_pairs(
        [*twin_pairs(BLANK).margins, *(NINE * signs(900, 50))],
        conditions=(*twin_pairs(BLANK).conditions, *("math",) * 950),
        twins=[*twin_pairs(BLANK).twins, *[-1] * 950],
    )
    assert sentence(card_of(many), "Conditions are ignored")
    assert not sentence(card_of(many), "No better than chance")


def test_ignored_conditions_are_said_without_twins_if_no_winner_changes():
    seen = plain(180, 20, conditions=("math",) * 200)
    same = plain(180, 20, conditions=("math",) * 200)
    assert sentence(
        card_of(seen, {"swapped": same}), "Conditions are ignored: another condition's wording changes"
    )
    other = plain(176, 24, conditions=("math",) * 200)
    assert not card_of(seen, {"swapped": other}).failed
    assert not card_of(plain(180, 20), {"swapped": plain(180, 20)}).failed  # no row names a condition


def test_a_condition_at_chance_is_said():
    card = card_of(plain(250, 50, conditions=("math",) * 200 + ("code",) * 100))
    assert [first for first in card.verdict if first.startswith("Condition ")] == [
        "Condition code is no better than chance: accuracy 0.500 on 100 rows, 95% interval 0.404 to 0.596."
    ]
    assert not card.failed


def test_escaped_scores_are_said():
    chosen = np.full(100, NINE)
    chosen[:3] = 6.0
    assert sentence(
        card_of(make_pairs(chosen, chosen=chosen)), "Scores leave the bounds: 1.5% lie outside ±5."
    )
    chosen[0] = 4.0
    assert not sentence(card_of(make_pairs(chosen, chosen=chosen)), "Scores leave")  # 2 of 200 are 1 %


def test_bad_calibration_is_said():
    assert sentence(
        card_of(plain(150, 50)), "Badly calibrated (over-confident): mean confidence 0.900, accuracy 0.750"
    )
    assert sentence(card_of(make_pairs(np.full(200, 1.0))), "Badly calibrated (under-confident)")
    assert not sentence(card_of(plain(170, 30)), "Badly calibrated")


def test_too_few_rows_are_said_and_fail_nothing():
    card = card_of(plain(6, 4))
    assert card.verdict == (
        "Too few rows to tell how good it is: accuracy 0.600 on 10 rows, 95% interval 0.313 to 0.832.",
    )
    assert not card.failed
    few_twins = make_pairs(
        [NINE, -NINE] * 4 + [NINE] * 180 + [-NINE] * 20,
        twins=[0, 0, 1, 1, 2, 2, 3, 3] + [-1] * 200,
        conditions=("a",) * 208,
    )
    assert sentence(card_of(few_twins), "Too few twins to tell")
    assert not card_of(few_twins).failed


def test_nothing_to_tell_without_rows():
    card = card_of(make_pairs([]))
    assert card.verdict == ("Too few rows to tell: there is no held-out pair.",)
    assert (card.overall, card.controls, card.length, card.scores, card.worst) == (None, None, None, None, ())
    assert tables(card) == {}


def test_scores_that_are_not_numbers_are_left_out_and_said():
    seen, blank = plain(180, 20, conditions=("a",) * 200), plain(100, 100, conditions=("a",) * 200)
    seen.chosen[0], blank.rejected[199] = np.nan, np.inf
    card = card_of(seen, {"blank": blank})
    assert card.verdict == ("Scores are not numbers: 2 pairs with an infinite or undefined score left out.",)
    assert card.failed
    assert card.overall.accuracy.value == pytest.approx(179 / 198)
    json.dumps(card.to_dict(), allow_nan=False)


# Figures, tables, JSON


def full_card() -> ReportCard:
    controls = {"blank": twin_pairs(BLANK), "novel": twin_pairs(GOOD[::-1])}
    texts = lambda index: PairText("p", "c", "r", "brief", f"test.jsonl:{index}")  # noqa: E731
    return card_of(twin_pairs(GOOD), controls, texts=texts)


@pytest.mark.parametrize(
    "card",
    [
        full_card(),
        card_of(make_pairs([])),
        card_of(make_pairs([0.0, np.nan]), bound=None),
        card_of(plain(1, 0)),
    ],
    ids=["full", "empty", "one tie", "one pair"],
)
def test_json_gives_the_card_back(card):
    text = json.dumps(card.to_dict(), allow_nan=False)
    assert ReportCard.from_dict(json.loads(text)) == card
    json.dumps([results(card), tables(card)], allow_nan=False)


def test_results_hold_the_controls_that_were_run():
    figures = results(full_card())
    assert figures["seen"] == {"accuracy": pytest.approx(200 / 220), "twins": pytest.approx(90 / 110)}
    assert figures["blank"] == {"accuracy": 0.5, "twins": 0.0}
    assert "swapped" not in figures
    assert "unseen" not in figures
    assert figures["controls_over"] == "twins"
    assert figures["conditions"]["brief"]["rows"] == 110
    assert figures["conditions"]["brief"]["accuracy"] == pytest.approx(100 / 110)
    assert figures["conditions"]["brief"]["ece"] == pytest.approx(100 / 110 - 0.9)
    assert set(figures["sources"]) == {"test.jsonl"}
    assert figures["length"]["longer_wins"] == 0.5
    assert figures["verdict"] == list(full_card().verdict)


def test_tables_are_rectangular_and_absent_where_empty():
    by_name = tables(full_card())
    assert set(by_name) == {
        "controls", "conditions", "conditions_by_control", "sources", "reliability",
        "length", "position", "scores", "histogram", "worst",
    }  # fmt: skip
    for columns, rows in by_name.values():
        assert rows
        assert all(len(row) == len(columns) for row in rows)
    columns, rows = by_name["controls"]
    assert [row[0] for row in rows] == ["seen", "novel", "blank"]
    assert dict(zip(columns, rows[2], strict=True))["twins both right"] == 0
    assert "conditions_by_control" not in tables(card_of(plain(2, 1)))
    assert "worst" not in tables(card_of(plain(2, 0)))


def test_tables_say_what_their_columns_say():
    by_name = tables(full_card())

    def row(name, at):
        columns, rows = by_name[name]
        return dict(zip(columns, rows[at], strict=True))

    # 200 of 220 right: mean margin (200 - 20) / 220 · log 9
    everything = row("conditions", 0)
    assert everything == {
        "condition": "all",
        "accuracy": pytest.approx(200 / 220),
        "low": pytest.approx(full_card().overall.accuracy.low),
        "high": pytest.approx(full_card().overall.accuracy.high),
        "rows": 220,
        "pairs": 220,
        "margin": pytest.approx(180 / 220 * NINE),
        "ece": pytest.approx(200 / 220 - 0.9),
    }
    assert [first[0] for first in by_name["conditions"][1]] == ["all", "brief", "long"]
    assert row("conditions_by_control", 0) == {
        "condition": "brief",
        "seen": pytest.approx(100 / 110),
        "novel": pytest.approx(100 / 110),
        "blank": 1.0,
    }
    # every confidence is 0.9, the edge of a bin
    assert row("reliability", 0) | {"from": 0, "to": 0} == {
        "pairs of": "all",
        "from": 0,
        "to": 0,
        "confidence": pytest.approx(0.9),
        "share right": pytest.approx(200 / 220),
        "share of pairs": 1.0,
        "pairs": 220,
    }
    assert row("scores", 1)["50%"] == pytest.approx(-NINE / 2)
    assert row("length", 0)["accuracy"] == 0.5
    assert row("worst", 0)["margin"] == pytest.approx(-NINE)


def test_controls_must_be_known_and_of_the_same_pairs():
    with pytest.raises(ValueError, match="'blanc'"):
        card_of(plain(2, 1), {"blanc": plain(2, 1)})
    with pytest.raises(ValueError, match="2 pairs for 3"):
        card_of(plain(2, 1), {"blank": plain(1, 1)})
    with pytest.raises(ValueError, match="differ in length"):
        make_pairs([1.0], twins=[0, 1])
