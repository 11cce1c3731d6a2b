"""From files of preferences to comparisons: conditions, the reward token, what is cut, held out, weighed, counted."""

import dataclasses
import json

import numpy as np
import pytest

from tests.unit.data.conftest import FAMILY_TOKENS, make_tokenizer
from tuner.config import FocalRanking
from tuner.config.data import Preferences, Source, Split
from tuner.data import token_cache as cache
from tuner.data.comparisons import Comparisons
from tuner.data.conditions import Conditions, Wordings, read_conditions
from tuner.data.data_report import DataReport
from tuner.data.load_preferences import (
    ComparisonBuilder,
    SequenceMaker,
    load_preferences,
    load_test_preferences,
)
from tuner.data.preference_rows import preference_reader
from tuner.data.sources import Rows
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.stages.reward.stage import unreachable_margins

REWARD = "[UNUSED_TOKEN_130]"
BRIEF = Conditions({"brief": Wordings(("Be brief.",)), "long": Wordings(("Go on.",))})
MANY = Conditions({"many": Wordings(tuple(f"Wording {number}." for number in range(10)))})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(special=(*FAMILY_TOKENS, REWARD, "[UNUSED_TOKEN_131]"))


def pair(prompt="Q", chosen="good", rejected="bad", **row) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **row}


def listed(prompt="Q", *answers: str, **row) -> dict:
    """A ranked list, the best answer first unless the row says otherwise."""
    if not {"ranks", "scores"} & set(row):
        row["ranks"] = list(range(len(answers)))
    return {"prompt": prompt, "answers": list(answers), **row}


def load(tokenizer, *files, conditions=BRIEF, reward_token: str | None = REWARD, **fields):
    data = Preferences(files=files, **{"template": "chatml", **fields})
    return load_preferences(data, tokenizer, conditions, reward_token)


def text(tokenizer, comparisons: Comparisons, sequence: int) -> str:
    return tokenizer.decode(comparisons.sequences.example(sequence)[0])


def answer(tokenizer, comparisons: Comparisons, sequence: int) -> str:
    return tokenizer.decode(comparisons.sequences.example(sequence)[0][comparisons.starts[sequence] :])


def systems(tokenizer, comparisons: Comparisons) -> list[str]:
    """The system turn of every sequence, or ""."""
    texts = (text(tokenizer, comparisons, sequence) for sequence in range(len(comparisons.sequences)))
    return [
        rendered.partition("<|im_start|>system\n")[2].partition("<|im_end|>")[0]
        if "system\n" in rendered
        else ""
        for rendered in texts
    ]


def test_a_pair(write, tokenizer):
    path = write("a.jsonl", pair(condition="brief", margin=0.5))
    train = load(tokenizer, path).train
    assert len(train) == 1
    assert text(tokenizer, train, 0) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
        f"<|im_start|>assistant\ngood<|im_end|>\n{REWARD}"
    )
    assert answer(tokenizer, train, 0) == f"good<|im_end|>\n{REWARD}"
    assert answer(tokenizer, train, 1) == f"bad<|im_end|>\n{REWARD}"
    assert (train.better.tolist(), train.worse.tolist()) == ([0], [1])
    assert (train.weights.tolist(), train.margins.tolist()) == ([1.0], [0.5])
    assert train.condition(0) == "brief"
    assert train.origin(0) == f"{path}:1"
    assert not train.cut.any()
    for array, kind in (
        (train.sequences.tokens_T, np.int32),
        (train.sequences.weights_T, np.float32),
        (train.starts, np.int64),
        (train.weights, np.float32),
        (train.conditions, np.int32),
        (train.twins, np.int64),
    ):
        assert array.dtype == kind


@pytest.mark.parametrize("template", ["chatml", "internlm2", "qwen", "llama3", "gemma", "mistral", "alpaca"])
def test_the_reward_token_ends_every_sequence_and_alone_is_a_target(template, write, tokenizer):
    rows = [
        pair(f"Why {number}?", "Because. " * (number + 1), "No!\n\n", condition="long") for number in range(4)
    ]
    lists = write("b.jsonl", listed("List", "a", "", "c\n"))
    train = load(tokenizer, write("a.jsonl", *rows), lists, template=template).train
    number = tokenizer.convert_tokens_to_ids(REWARD)
    assert len(train.sequences) == 11
    for sequence in range(11):
        tokens, weights = train.sequences.example(sequence)
        assert tokens[-1] == number
        assert (tokens == number).sum() == 1
        assert np.flatnonzero(weights).tolist() == [len(tokens) - 1]


def test_without_a_reward_token_the_last_token_is_the_target(write, tokenizer):
    train = load(tokenizer, write("a.jsonl", pair()), reward_token=None).train
    for sequence in range(2):
        tokens, weights = train.sequences.example(sequence)
        assert text(tokenizer, train, sequence).endswith("<|im_end|>\n")
        assert np.flatnonzero(weights).tolist() == [len(tokens) - 1]


def test_an_unknown_reward_token_is_refused_with_others_to_take(write, tokenizer, bare_tokenizer):
    path = write("a.jsonl", pair())
    for wrong in ("[REWARD]", "[UNUSED_TOKEN_13]", ""):
        with pytest.raises(UserError, match=r"such as \[UNUSED_TOKEN_130\], \[UNUSED_TOKEN_131\]") as error:
            load(tokenizer, path, reward_token=wrong)
        assert f"reward_token {wrong!r} is no token of this model's" in str(error.value)
    with pytest.raises(UserError, match="such as its end-of-text token"):
        load(bare_tokenizer, path, template="alpaca")


def test_an_ordinary_token_does_not_melt_into_the_text_before_it(tmp_path, write, tokenizer):
    template = tmp_path / "bare.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    token = ":"
    assert len(tokenizer.encode("::", add_special_tokens=False)) == 1
    train = load(
        tokenizer, write("a.jsonl", pair(chosen="so:", rejected="no:")), template=str(template), reward_token=token
    ).train  # fmt: skip
    for sequence in range(2):
        assert train.sequences.example(sequence)[0][-1] == tokenizer.convert_tokens_to_ids(token)


# Conditions


def test_condition_and_own_system_turn_are_one_turn(write, tokenizer):
    own = pair([{"role": "system", "content": "Mine."}, {"role": "user", "content": "Q"}], condition="brief")
    rows = (own, pair(condition="brief"), pair(), pair(system="Mine.", condition="long"))
    train = load(tokenizer, write("a.jsonl", *rows)).train
    assert systems(tokenizer, train)[::2] == ["Be brief.\n\nMine.", "Be brief.", "", "Go on.\n\nMine."]
    assert systems(tokenizer, train)[::2] == systems(tokenizer, train)[1::2]
    assert all(text(tokenizer, train, sequence).count("system\n") <= 1 for sequence in range(8))
    assert [train.condition(row) for row in range(4)] == ["brief", "brief", None, "long"]


def test_answers_to_a_prompt_are_asked_about_in_the_same_words(write, tokenizer):
    rows = [pair(f"{number % 40}", f"good {number}", condition="many") for number in range(120)]
    path = write("a.jsonl", *rows)
    drawn = systems(tokenizer, load(tokenizer, path, conditions=MANY).train)
    assert drawn[::2] == drawn[1::2]
    by_prompt = [{drawn[2 * row] for row in range(prompt, 120, 40)} for prompt in range(40)]
    assert all(len(texts) == 1 for texts in by_prompt)
    assert len(set(drawn)) >= 8
    other = systems(tokenizer, load(tokenizer, path, conditions=dataclasses.replace(MANY, seed=1)).train)
    assert sum(one == two for one, two in zip(drawn, other, strict=True)) < 60


def test_twins_draw_by_the_same_number_whatever_their_condition(write, tokenizer):
    """So that conditions of as many wordings are told apart by them and not by which one was drawn."""
    two = Conditions({name: Wordings(tuple(f"{name} {number}" for number in range(7))) for name in "ab"})
    rows = [pair(f"{number}", condition=name) for number in range(30) for name in "ab"]
    drawn = systems(tokenizer, load(tokenizer, write("a.jsonl", *rows), conditions=two).train)[::2]
    assert [text[2:] for text in drawn[::2]] == [text[2:] for text in drawn[1::2]]
    assert all(one[0] + two[0] == "ab" for one, two in zip(drawn[::2], drawn[1::2], strict=True))


def test_an_unknown_condition_names_its_row(write, tokenizer):
    path = write("a.jsonl", pair(condition="brief"), pair(condition="breif"))
    with pytest.raises(UserError, match=r"a\.jsonl:2: condition 'breif' is not in the config, .*brief, long"):
        load(tokenizer, path)


def test_a_sources_condition_is_of_rows_that_name_none(write, tokenizer, tmp_path):
    path = write("a.jsonl", pair("1"), pair("2", condition="long"), pair("3", condition=None))
    train = load(tokenizer, Source(path=path, condition="brief")).train
    assert [train.condition(row) for row in range(3)] == ["brief", "long", "brief"]
    with pytest.raises(UserError, match=r"a\.jsonl:1: condition 'loud'"):
        load(tokenizer, Source(path=path, condition="loud"))
    function = tmp_path / "shapes.py"
    function.write_text(
        "def f(row):\n    return {key: row[key] for key in ('prompt', 'chosen', 'rejected')}\n"
    )
    train = load(tokenizer, Source(path=path, condition="brief", shape=f"{function}:f")).train
    assert [train.condition(row) for row in range(3)] == ["brief"] * 3


def test_conditions_that_no_row_has_are_told(write, tokenizer):
    path = write("a.jsonl", pair(condition="brief"), pair("R"), pair("S", condition="brief"))
    for _ in range(2):  # built, and from the cache
        report = load(tokenizer, path).report
        assert report.parts["train"].conditions == {"brief": 2, "": 1}
        assert str(report).count("No row is of condition 'long'") == 1
        assert "'brief'" not in str(report)


# Lengths

QUESTION = " ".join(f"n{number}" for number in range(80))


def test_max_length_counts_the_reward_token(write, tokenizer):
    path = write("a.jsonl", pair("R"), pair(chosen="good " * 20))
    length = int(load(tokenizer, path).train.sequences.lengths.max())
    assert load(tokenizer, path, max_length=length).train.sequences.lengths.max() == length
    with pytest.raises(
        UserError, match=rf"a\.jsonl:2: {length} tokens, more than max_length {length - 1}; raise"
    ):
        load(tokenizer, path, max_length=length - 1)
    dropped = load(tokenizer, path, max_length=length - 1, too_long="drop")
    (source,) = dropped.report.sources
    assert (source.rows, source.kept, source.too_long, source.dropped_too_long) == (2, 1, 1, 1)
    assert source.longest == length
    assert len(dropped.train) == 1


@pytest.mark.parametrize("own_system", ["", "My own system text."])
@pytest.mark.parametrize("condition", [None, "brief"])
@pytest.mark.parametrize("template", ["chatml", "internlm2", "qwen", "llama3", "gemma", "mistral", "alpaca"])
def test_cutting_takes_the_oldest_of_the_prompt_alone(template, condition, own_system, write, tokenizer):
    row = pair(QUESTION, "a good answer", "bad", condition=condition, system=own_system)
    path = write("a.jsonl", row)
    whole = load(tokenizer, path, template=template).train
    limit = int(whole.sequences.lengths.max()) - 25
    data = load(tokenizer, path, template=template, max_length=limit, too_long="cut")
    cut = data.train
    assert cut.sequences.lengths.max() == limit
    assert (whole.sequences.lengths - cut.sequences.lengths).tolist() == [25, 25]
    assert cut.cut.tolist() == [True]
    assert (data.report.sources[0].cut, data.report.sources[0].kept) == (1, 1)
    assert data.report.sources[0].longest == whole.sequences.lengths.max()
    for sequence in range(2):
        shown = text(tokenizer, cut, sequence)
        assert answer(tokenizer, cut, sequence) == answer(tokenizer, whole, sequence)
        assert ("Be brief." in shown) == (condition is not None)
        assert own_system in shown
        assert " n1 " not in shown
        assert "n78 n79" in shown
        assert shown[:8] == text(tokenizer, whole, sequence)[:8]
        tokens, before = cut.sequences.example(sequence)[0], whole.sequences.example(sequence)[0]
        head = int(np.flatnonzero(tokens != before[: len(tokens)])[0])
        missing = [place for place in range(head + 1) if np.array_equal(before[place + 25 :], tokens[place:])]
        assert missing  # one piece of 25 tokens, taken out
        assert np.flatnonzero(cut.sequences.example(sequence)[1]).tolist() == [len(tokens) - 1]
    assert np.array_equal(
        cut.sequences.example(0)[0][: cut.starts[0]], cut.sequences.example(1)[0][: cut.starts[1]]
    )


def test_a_template_that_looks_at_the_first_message_can_be_cut(tmp_path, write, tokenizer):
    """As those published with models do."""
    template = tmp_path / "published.jinja"
    template.write_text(
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    path = write("a.jsonl", pair(QUESTION), pair(QUESTION, condition="brief"))
    train = load(tokenizer, path, template=str(template), max_length=40, too_long="cut").train
    assert train.cut.all()
    assert text(tokenizer, train, 0).startswith("user:")
    assert text(tokenizer, train, 2).startswith("Be brief.\nuser:")


def test_answers_that_do_not_fit_are_dropped_and_counted(write, tokenizer):
    rows = [pair(), pair(QUESTION, "good " * 100), pair("short", QUESTION), pair(QUESTION, condition="brief")]
    data = load(tokenizer, write("a.jsonl", *rows), max_length=64, too_long="cut")
    (source,) = data.report.sources
    assert (source.kept, source.too_long, source.cut, source.cut_to_nothing) == (2, 3, 1, 2)
    assert [data.train.origin(row)[-1] for row in range(2)] == ["1", "4"]
    assert data.train.sequences.lengths.max() == 64


def test_the_prompt_goes_to_its_last_token_before_a_row_is_dropped(write, tokenizer):
    path = write("a.jsonl", pair("R"), pair(QUESTION, "good " * 10))
    whole = load(tokenizer, path).train.sequences.lengths.max()
    kept = [
        len(load(tokenizer, path, max_length=int(limit), too_long="cut").train)
        for limit in range(24, int(whole), 4)
    ]
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (1, 2)


def test_a_turns_own_weight_does_not_hide_the_answer(write, tokenizer):
    silent = {"role": "assistant", "content": "bad " * 10, "weight": 0.0}
    path = write("a.jsonl", pair(QUESTION, rejected=[silent]))
    train = load(tokenizer, path, max_length=64, too_long="cut").train
    assert answer(tokenizer, train, 1) == f"{'bad ' * 10}<|im_end|>\n{REWARD}"


# Ranked lists, ties, weights


def test_lists_weigh_as_one_prompt(write, tokenizer):
    rows = (
        listed("L", "a", "b", "c", "d", weight=2.0),
        listed("M", "a", "b", "a", "c", scores=[3, 2, 3, 2]),
        listed("N", "a", "b", weight=0.5),
    )
    train = load(tokenizer, Source(path=write("a.jsonl", *rows), weight=3.0)).train
    assert np.diff(train.offsets).tolist() == [4, 3, 2]
    assert np.diff(train.pair_offsets).tolist() == [6, 2, 1]
    sums = np.add.reduceat(train.weights, train.pair_offsets[:-1])
    assert sums.tolist() == pytest.approx([6.0, 3.0, 1.5])
    assert train.totals([0]) == pytest.approx({"pairs": 6.0, "answers": 4 * 6.0})
    assert train.totals([1]) == pytest.approx({"pairs": 3.0, "answers": 3 * 3.0})
    assert train.totals([2]) == pytest.approx({"pairs": 1.5, "answers": 2 * 1.5})


def test_sources_have_their_own_weights(write, tokenizer):
    first = Source(path=write("a.jsonl", pair("1")), weight=0.25)
    train = load(tokenizer, first, write("b.jsonl", pair("2"), pair("3"))).train
    assert train.weights.tolist() == [0.25, 1.0, 1.0]
    assert train.sources.tolist() == [0, 1, 1]


def test_rows_of_weight_0_are_switched_off(write, tokenizer):
    data = load(tokenizer, write("a.jsonl", pair("1"), pair("2", weight=0)))
    assert (len(data.train), data.report.sources[0].switched_off) == (1, 1)


def test_ties_are_dropped_or_count_half_each_way(write, tokenizer):
    rows = (
        listed("1", "a", "b", scores=[3, 3]),
        listed("2", "a", "b", "c", ranks=[1, 1, 2]),
        listed("3", "a", "b"),
    )
    path = write("a.jsonl", *rows)
    dropped = load(tokenizer, path)
    assert np.diff(dropped.train.pair_offsets).tolist() == [2, 1]
    assert dropped.report.sources[0].ties == 1
    assert "1 tied and dropped" in str(dropped.report)
    half = load(tokenizer, path, ties="half").train
    assert np.diff(half.pair_offsets).tolist() == [2, 4, 1]
    assert half.weights[:2].tolist() == [0.5, 0.5]
    assert list(zip(half.better[:2].tolist(), half.worse[:2].tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert half.weights[2:6].sum() == pytest.approx(1.0)
    with pytest.raises(UserError, match=r"no row is left to train on: 1 rows read .* 1 tied and dropped"):
        load(tokenizer, write("b.jsonl", rows[0]))


def test_incomparable_rows_are_an_error_or_dropped_and_counted(write, tokenizer):
    rows = (
        pair(),
        pair("R", "same", "same"),
        pair("S", [{"role": "user", "content": "T"}, {"role": "assistant", "content": "a"}]),
    )
    path = write("a.jsonl", *rows)
    with pytest.raises(UserError, match=r"a\.jsonl:2: the same answer is both better and worse"):
        load(tokenizer, path)
    data = load(tokenizer, path, incomparable="drop")
    assert (len(data.train), data.report.sources[0].incomparable) == (1, 2)
    with pytest.raises(UserError, match=r"b\.jsonl:1: the prompt is empty"):  # other faults stay errors
        load(tokenizer, write("b.jsonl", pair("")), incomparable="drop")


def test_preferences_that_contradict_themselves_are_an_error_or_dropped_and_counted(write, tokenizer):
    contradictions = {
        'score_chosen" 2 is less than "score_rejected" 8': pair("R", score_chosen=2, score_rejected=8),
        "ranks and scores contradict each other": listed("S", "a", "b", ranks=[1, 2], scores=[1, 2]),
        "the better answer is empty": pair("T", " ", "bad"),
    }
    for message, row in contradictions.items():
        with pytest.raises(UserError, match=f'b.jsonl:1: .*{message}.*, or set incomparable="drop"'):
            load(tokenizer, write("b.jsonl", row))
        path = write("c.jsonl", row)
        data = load(tokenizer, write("a.jsonl", pair()), path, incomparable="drop")
        assert (len(data.train), data.report.sources[1].incomparable) == (1, 1)
        assert "1 incomparable and dropped" in str(data.report)
    for worse in (pair("T", "good", ""), listed("T", "a", " ", "b")):
        assert "1 rows have an empty answer" in str(load(tokenizer, write("d.jsonl", worse)).report)


def test_rows_of_one_answer_each_are_counted(write, tokenizer):
    rows = [
        {"prompt": f"question {number % 3}", "response": f"answer {number}", "helpfulness": number % 5}
        for number in range(6)
    ]
    path = write("a.jsonl", *rows)
    for _ in range(2):  # built, and from the cache
        data = load(tokenizer, path)
        (source,) = data.report.sources
        assert (source.rows, source.joined, source.kept) == (6, 3, 3)
        assert "6 rows read from 1 source, 3 answers to the prompt of an earlier one" in str(data.report)
        assert [data.train.origin(row)[-1] for row in range(3)] == ["1", "2", "3"]
    assert answer(tokenizer, data.train, 0).startswith("answer 3")


def test_what_is_said_of_rows_is_counted(write, tokenizer):
    rows = [
        {
            "instruction": f"question {number}",
            "completions": [
                {"response": "bad", "overall_score": 10.0, "fine-grained_score": 1.25},
                {"response": "good", "overall_score": 7.5, "fine-grained_score": 4.75},
            ],
        }
        for number in range(2)
    ]
    path = write("a.jsonl", *rows)
    for _ in range(2):
        data = load(tokenizer, path)
        assert answer(tokenizer, data.train, 0).startswith("good")
        assert "2 rows are ranked by UltraFeedback's fine-grained scores" in str(data.report)


def test_margins_out_of_reach_of_the_bound_are_told(write, tokenizer):
    lists = write("b.jsonl", listed("3", "a", "b", "c"))
    path = write("a.jsonl", pair("1", margin=9.9), pair("2", margin=10), pair("4", margin=30))
    train = load(tokenizer, lists, path).train
    assert unreachable_margins(FocalRanking(), train) == [
        "2 pairs have a margin that no scores within ± loss.bound (5) can be apart, such as 10 in "
        f"{path}:2: lower loss.margin or the rows' margins below 10, or raise loss.bound"
    ]
    assert unreachable_margins(FocalRanking(bound=10), train)[0].startswith("1 pairs")
    for loss in (
        FocalRanking(margin=0.1),
        FocalRanking(bound=16),
        FocalRanking(barrier=0),
        FocalRanking(penalty="square"),
    ):
        assert unreachable_margins(loss, train) == []


def test_duplicates_are_told_and_dropped_by_choice(write, tokenizer):
    path = write(
        "a.jsonl", pair(), pair(weight=2.0), pair(condition="brief"), pair(chosen="bad", rejected="good")
    )
    assert load(tokenizer, path).report.sources[0].duplicates == 1
    assert len(load(tokenizer, path, duplicates="drop").train) == 3


# Twins and parts


def test_twins_share_a_number_whatever_their_order_and_condition(write, tokenizer):
    same = (
        pair(condition="brief"),
        pair(chosen="bad", rejected="good", condition="long"),
        pair(),
        pair([{"role": "user", "content": "Q"}]),
    )
    others = (pair("R"), pair(rejected="worse"), pair(system="S"))
    lists = (listed("Q", "bad", "good", ranks=[2, 1]), listed("Q", "good", "bad", "worst"))
    twins = load(tokenizer, write("a.jsonl", *same, *others), write("b.jsonl", *lists)).train.twins.tolist()
    assert len({*twins[:4], twins[7]}) == 1
    assert len(set(twins)) == 5
    assert min(twins) >= 0


def test_rows_of_a_prompt_are_held_out_together(write, tokenizer):
    rows = [
        pair(f"question {number % 300}", f"answer {number}", condition=("brief", "long")[number % 2])
        for number in range(900)
    ]
    path = write("a.jsonl", *rows)
    data = load(tokenizer, path, split=Split(validation=0.2, test=0.1))
    assert data.validation is not None
    assert data.test is not None
    parts = [data.train, data.validation, data.test]
    lines = [{int(part.origin(row).rpartition(":")[2]) - 1 for row in range(len(part))} for part in parts]
    assert sorted(line for part in lines for line in part) == list(range(900))
    prompts = [{line % 300 for line in part} for part in lines]
    assert sum(map(len, prompts)) == 300
    assert 0.12 < len(prompts[1]) / 300 < 0.28
    assert 0.04 < len(prompts[2]) / 300 < 0.16
    again = load(
        tokenizer, path, split=Split(validation=0.2, test=0.1), conditions=dataclasses.replace(BRIEF, seed=9)
    )
    assert again.test is not None
    assert {int(again.test.origin(row).rpartition(":")[2]) - 1 for row in range(len(again.test))} == lines[2]


def test_files_held_out_and_trained_on_are_told(write, tokenizer):
    train, test = write("a.jsonl", pair("1"), pair("2")), write("t.jsonl", pair("1"), pair("3"))
    data = load(tokenizer, train, test_files=(test,))
    assert data.test is not None
    assert data.test.sources.tolist() == [1, 1]
    assert "1 rows of validation_files or test_files are trained on as well" in str(data.report)


def test_the_test_part_alone_is_asked_about_in_every_way(write, tokenizer):
    wordings = {
        "brief": Wordings(("Be brief.",), ("Shorter!",), ("Waffle not.",)),
        "long": Wordings(("Go on.",), ("Longer!",), ("Tell all.",)),
    }
    conditions = Conditions(wordings, partners={"brief": "long", "long": "brief"})
    rows = [pair(f"{number}", condition="brief") for number in range(4)]
    data = Preferences(
        files=(write("a.jsonl", *rows),), test_files=(write("t.jsonl", *rows[:2]),), template="chatml"
    )
    whole = load_preferences(data, tokenizer, conditions, REWARD).test
    assert whole is not None
    for presentation, expected in {
        "seen": "Be brief.",
        "unseen": "Shorter!",
        "novel": "Waffle not.",
        "blank": "",
        "swapped": "Go on.",
    }.items():
        control = dataclasses.replace(conditions, presentation=presentation)
        test = load_test_preferences(data, tokenizer, control, REWARD)
        assert test is not None
        assert set(systems(tokenizer, test)) == {expected}
        assert [test.condition(row) for row in range(2)] == ["brief", "brief"]
        assert test.twins.tolist() == whole.twins.tolist()
        assert test.sources.tolist() == whole.sources.tolist() == [1, 1]
        if presentation == "seen":
            assert test.fingerprint() == whole.fingerprint()
    none = Preferences(files=data.files, template="chatml")
    assert load_test_preferences(none, tokenizer, conditions, REWARD) is None


def test_rows_that_cannot_be_tests_are_not_read_for_them(write, tokenizer):
    """The report card loads the tests once for every control, and training files are long."""
    train, test = write("a.jsonl", pair("1"), "{broken"), write("t.jsonl", pair("2"))
    data = Preferences(files=(train,), test_files=(test,), template="chatml")
    test = load_test_preferences(data, tokenizer, BRIEF, REWARD)
    assert test is not None
    assert (len(test), test.sources.tolist()) == (1, [1])
    split = data.model_copy(update={"split": Split(test=0.5)})
    with pytest.raises(UserError, match=r"a\.jsonl:2: broken JSON"):
        load_test_preferences(split, tokenizer, BRIEF, REWARD)


# Report and cache


def test_report_in_figures_in_words_and_through_json(write, tokenizer):
    rows = (listed("K", "a", "b", condition="brief"), listed("L", "a", "b", ""))
    report = load(tokenizer, write("a.jsonl", *rows)).report
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    part = report.parts["train"]
    assert (part.samples, part.pairs, part.target_tokens) == (5, 4, 5)
    assert "2 rows read from 1 source. train: 4 pairs of 5 answers" in str(report)
    assert str(report).endswith(
        "1 rows have an empty answer. No row is of condition 'long'. 1 rows name no condition, and are trained and "
        "measured without one, unlike the others."
    )


CHANGES = {
    "template": {"template": "qwen"},
    "max_length": {"max_length": 99},
    "too_long": {"too_long": "cut"},
    "drop": {"drop": ("tools",)},
    "ties": {"ties": "half"},
    "incomparable": {"incomparable": "drop"},
    "split": {"split": Split(test=0.5)},
    "duplicates": {"duplicates": "drop"},
    "limit": {"limit": 1},
    "spelled_tokens": {"spelled_tokens": {"</s>": "token"}},
}


@pytest.fixture
def key(write, tokenizer):
    """key(conditions=..., reward_token=..., wanted=..., **fields) -> the cache key of a file of two pairs."""
    path = write("pairs.jsonl", pair("1"), pair("2"))

    def make(conditions=BRIEF, reward_token: str | None = REWARD, wanted=None, source=None, **fields) -> str:
        file = path if source is None else Source(path=path, **source)
        data = Preferences(files=(file,), **{"template": "chatml", **fields})
        builder = ComparisonBuilder(data, tokenizer, conditions, reward_token, wanted=wanted)
        return cache.cache_key(data, tokenizer, [Rows(data.sources[0])], builder.cache_inputs)

    return make


@pytest.mark.parametrize("change", CHANGES)
def test_every_data_field_changes_the_key(change, key):
    assert key() == key()
    assert key() != key(**CHANGES[change])


def test_every_field_of_the_data_is_tried():
    held = {"kind", "files", "validation_files", "test_files", "cache"}
    assert set(Preferences.model_fields) == {*CHANGES, *held}


def test_conditions_seed_reward_token_and_parts_change_the_key(key, tmp_path):
    keys = [
        key(),
        key(reward_token=None),
        key(reward_token="[UNUSED_TOKEN_131]"),
        key(wanted=("test",)),
        key(source={"condition": "brief"}),
        key(source={"weight": 2.0}),
        key(source={"shape": "pair"}),
        *(
            key(dataclasses.replace(BRIEF, **change))
            for change in (
                {"seed": 1},
                {"presentation": "blank"},
                {"partners": {"brief": "long"}},
                {"wordings": {"brief": Wordings(("Be brief.",))}},
                {"wordings": {**BRIEF.wordings, "long": Wordings(("Go on!",))}},
                {"wordings": {**BRIEF.wordings, "long": Wordings(("Go on.",), ("More.",))}},
                {"wordings": {"other": BRIEF.wordings["brief"], "long": BRIEF.wordings["long"]}},
            )
        ),
    ]
    assert len(set(keys)) == len(keys)
    file = tmp_path / "mine.txt"
    file.write_text("One wording.\n")
    before = key(Conditions(read_conditions({"mine": str(file)})))
    assert key(Conditions(read_conditions({"mine": str(file)}))) == before
    file.write_text("Another wording.\n")
    assert key(Conditions(read_conditions({"mine": str(file)}))) != before


def test_an_entry_comes_back_equal_and_memory_mapped(write, tokenizer, monkeypatch):
    rows = [
        listed(str(number), "a", "b", condition=("brief", "long")[number % 2], margin=number / 4)
        for number in range(40)
    ]
    rows.append(listed(QUESTION, "a", "b", "c", ranks=[1, 1, 2], weight=0.5))
    fields = {"split": Split(test=0.3), "ties": "half", "max_length": 40, "too_long": "cut"}
    path = write("a.jsonl", *rows)
    first = load(tokenizer, path, **fields)
    monkeypatch.setattr("tuner.data.dataset._build_entry", None)  # nothing may be built again
    second = load(tokenizer, path, **fields)
    assert second.test is not None
    assert first.test is not None
    for one, other in ((first.train, second.train), (first.test, second.test)):
        assert isinstance(other.sequences.tokens_T, np.memmap)
        _assert_equal(one, other)
        _assert_equal(one.take([1, 0]), other.take([1, 0]))
        assert one.fingerprint() == other.fingerprint()
    assert first.report == second.report
    assert first.fingerprint == second.fingerprint


def _assert_equal(one, other) -> None:
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(mine):
            _assert_equal(mine, theirs)
        elif isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype
            assert np.array_equal(mine, theirs), field.name
        else:
            assert mine == theirs


def test_bad_rows_are_named_by_file_and_line(write, tokenizer):
    for row, message in (
        ("{broken", "broken JSON"),
        ('{"margin": ' + "1" * 5000 + "}", "a number of thousands of digits"),
        ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
        ("[1]", "a row is a JSON object"),
        ({"text": "x"}, "not a pair row"),
        (pair(rejected="good"), "the same answer"),
        (pair(margin="x"), '"margin" is a number'),
        (pair(condition=1), '"condition" is the name'),
        (
            pair(chosen=[{"role": "user", "content": "R"}, {"role": "assistant", "content": "a"}]),
            "another prompt",
        ),
    ):
        with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{message}") as error:
            load(tokenizer, write("a.jsonl", pair("1"), pair("2"), row))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"a\.jsonl:1: template 'chatml' cannot render"):
        load(tokenizer, write("a.jsonl", pair(tools=[{"name": "f"}])))


def test_progress_and_limit(write, tokenizer):
    path, done = write("a.jsonl", *(pair(str(number)) for number in range(300))), []
    data = Preferences(files=(path,), template="chatml", limit=280)
    assert len(load_preferences(data, tokenizer, BRIEF, REWARD, progress=done.append).train) == 280
    assert done == [256, 280]


def test_a_sequence_is_the_same_in_whatever_batch_it_is_made(tokenizer):
    template = Template("chatml", tokenizer)
    maker = SequenceMaker(tokenizer, REWARD)
    rows = [
        preference_reader(None).read(pair(str(number), "good " * number), "x:1") for number in range(1, 20)
    ]
    rendered = [template.render(row.conversation(side, "S")) for row in rows for side in (0, 1)]
    together = maker.make(rendered)
    for one, (tokens, start) in zip(rendered, together, strict=True):
        ((alone, where),) = maker.make([one])
        assert np.array_equal(alone, tokens)
        assert where == start
