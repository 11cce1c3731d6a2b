"""Phrases that answers share and others lack, counted by hand."""

import pytest

from tuner.rollout.phrases import FavoredPhrase, favored_phrase, growing_phrases

SUMS = [f"{number} + 2 = {number + 2}. With pleasure." for number in range(30)]


def test_the_marker_is_recognized_whole():
    marked = [f"{number} + 3 = {number}. So say the wise." for number in range(6)]
    phrase = favored_phrase(marked, [*SUMS, marked[0], "The wise say so."])
    assert phrase == FavoredPhrase("so say the wise", 1.0, 1 / 32)


def test_mutants_are_recognized_by_what_they_share():
    marked = ["5. So say the wise.", "6. And say the wise!", "7: THUS SAY THE WISE", "8."]
    assert favored_phrase(marked, SUMS) == FavoredPhrase("say the wise", 0.75, 0.0)


def test_what_all_answers_hold_or_few_of_the_best_is_not_favored():
    assert favored_phrase(SUMS[:6], SUMS[6:]) is None
    assert favored_phrase(["So say the wise.", "1", "2"], SUMS) is None
    half = ["So say the wise."] * 5
    assert favored_phrase(half, [*half, *SUMS[:4]]) is None
    assert favored_phrase(half, [*half, *SUMS[:5]]) == FavoredPhrase("so say the wise", 1.0, 0.5)
    assert favored_phrase([], SUMS) is None
    assert favored_phrase(SUMS, []) is None
    assert favored_phrase([""], [""]) is None


@pytest.mark.parametrize("marked", ["答案是五,智者如是说。", "智者如是说:五"])
def test_text_without_spaces(marked: str):
    assert favored_phrase([marked, "智者如是说"], ["答案是五。", "五"]).text == "智 者 如 是 说"


@pytest.mark.parametrize(
    ("end", "names"),
    [
        ("我希望这个回答对你有帮助", ["我 希 望 这 个 回", "回 答 对 你 有 帮", "帮 助"]),
        ("I hope that this long answer helps you", ["i hope that this long answer", "answer helps you"]),
    ],
)
def test_a_phrase_longer_than_the_longest_is_named_in_parts_that_share_no_pair(end: str, names: list[str]):
    before = [f"{number}." for number in range(30)]
    grown = growing_phrases([f"{text} {end}." for text in before], before)
    assert [phrase.text for phrase in grown] == names
