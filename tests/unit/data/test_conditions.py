"""Conditions: where their wordings come from, and which of them a prompt gets."""

from collections import Counter

import pytest

from tuner.data.conditions import Conditions, Wordings, drawing_key, read_conditions
from tuner.data.conversation import Turn
from tuner.errors import UserError
from tuner.resources import conditions_folder

READY = ("helpful", "harmless", "honest", "math", "code", "summarize", "format")
KEYS = [drawing_key([Turn("user", f"question {number}")]) for number in range(3000)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "brief.txt"
    path.write_text(
        "\ufeff# Short answers.\n#\n\nBe brief.\n  Keep it short.  \n#1 is the shortest\n"
        "# unseen\n# known words in new frames\nShort, please.\n# novel\nNo waffling.\n",
        encoding="utf-8",
    )
    return str(path)


def test_texts_tuples_and_files(file):
    wordings = read_conditions(
        {"one": "A text.", "many": ("A", "B"), "file": file, "mixed": ("Mine.", file), "ready": "tuner:math"}
    )
    assert wordings["one"] == Wordings(("A text.",))
    assert wordings["many"] == Wordings(("A", "B"))
    brief = Wordings(
        ("Be brief.", "Keep it short.", "#1 is the shortest"), ("Short, please.",), ("No waffling.",)
    )
    assert wordings["file"] == brief
    assert wordings["mixed"].seen == ("Mine.", *brief.seen)
    assert wordings["mixed"].novel == brief.novel
    assert len(wordings["ready"].seen) > 1
    assert list(wordings) == ["one", "many", "file", "mixed", "ready"]


@pytest.mark.parametrize("name", READY)
def test_ready_conditions_come_in_both_languages_with_many_wordings(name):
    both, english, chinese = (
        read_conditions({"x": f"tuner:{name}{ending}"})["x"] for ending in ("", ".en", ".zh")
    )
    assert both.seen == (*english.seen, *chinese.seen)
    for condition in (english, chinese):
        wordings = (*condition.seen, *condition.unseen, *condition.novel)
        assert len(condition.seen) >= 8
        assert len(set(wordings)) == len(wordings)
    assert all(any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in chinese.seen)
    assert not any("\u4e00" <= letter <= "\u9fff" for text in english.seen for letter in text)


def test_every_ready_file_is_of_a_ready_condition():
    assert {file.stem for file in conditions_folder().glob("*.txt")} == {
        f"{name}.{language}" for name in READY for language in ("en", "zh")
    }


def test_wordings_that_cannot_be_read_are_told(tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("# nothing\n# unseen\nonly this\n")
    latin.write_bytes("für".encode("latin-1"))
    for value, message in (
        ("nowhere.txt", r"conditions\.mine: nowhere\.txt cannot be read"),
        (str(latin), r"conditions\.mine: .*latin\.txt cannot be read .*UTF-8"),
        (str(empty), r"conditions\.mine: .*empty\.txt has no wording to train on"),
        ("tuner:kind", r"'tuner:kind' does not come with tuner, which has: .*helpful"),
        ("tuner:twins/absent.txt", r"absent\.txt cannot be read"),
        (("Fine.", "nowhere.txt"), r"nowhere\.txt cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            read_conditions({"mine": value})


WORDINGS = {
    "long": Wordings(tuple(f"long {number}" for number in range(10)), ("unseen long",)),
    "brief": Wordings(("brief 0", "brief 1"), ("unseen brief", "unseen brief too"), ("novel brief",)),
}


def drawn(name="long", seed=0, **fields) -> list[str | None]:
    conditions = Conditions(WORDINGS, seed, **fields)
    return [conditions.prompt(name, key, "x:1") for key in KEYS]


def test_a_prompt_always_draws_the_same_and_each_wording_equally_often():
    assert drawn() == drawn()
    counts = Counter(drawn())
    assert set(counts) == set(WORDINGS["long"].seen)
    assert max(abs(count - 300) for count in counts.values()) < 80  # five standard deviations


def test_another_seed_is_another_draw():
    same = sum(one == other for one, other in zip(drawn(seed=0), drawn(seed=1), strict=True))
    assert 200 < same < 400  # a tenth by chance


def test_what_is_drawn_hangs_on_all_that_a_prompt_says():
    keys = {
        drawing_key(turns)
        for turns in (
            [Turn("user", "a")],
            [Turn("assistant", "a")],
            [Turn("user", "a", name="file")],
            [Turn("system", "s"), Turn("user", "a")],
            [Turn("user", "b")],
            [Turn("user", "a"), Turn("assistant", "b")],
        )
    }
    assert len(keys) == 6
    assert drawing_key([Turn("user", "a", learn=False, weight=0.0)]) in keys


def test_the_draw_does_not_follow_the_parts_of_a_split():
    """Which rows are held out is told by the same hash: every part must see every wording."""
    tenth = [text for text, key in zip(drawn(), KEYS, strict=True) if key[0] < 26]
    assert len(set(tenth)) == 10


def test_rows_without_a_condition_and_unknown_ones():
    conditions = Conditions(WORDINGS)
    assert conditions.prompt(None, KEYS[0], "x:1") is None
    with pytest.raises(
        UserError, match=r"^x:1: condition 'loud' is not in the config, which has: long, brief"
    ):
        conditions.prompt("loud", KEYS[0], "x:1")
    with pytest.raises(UserError, match="which has: none"):
        Conditions({}).prompt("loud", KEYS[0], "x:1")
    with pytest.raises(UserError, match="'loud'"):
        Conditions(WORDINGS, presentation="blank").prompt("loud", KEYS[0], "x:1")


def test_the_controls_of_the_report_card():
    assert set(drawn(presentation="unseen")) == {"unseen long"}
    assert set(drawn("brief", presentation="unseen")) == {"unseen brief", "unseen brief too"}
    assert set(drawn("brief", presentation="novel")) == {"novel brief"}
    assert set(drawn(presentation="blank")) == {None}
    assert set(drawn(presentation="swapped", partners={"long": "brief"})) == {"brief 0", "brief 1"}


@pytest.mark.parametrize("presentation", ["novel", "swapped"])
def test_a_presentation_without_wordings_is_an_error_and_no_crash(presentation):
    with pytest.raises(UserError, match="x:1: condition 'long' has no wording to present as"):
        drawn(presentation=presentation)
