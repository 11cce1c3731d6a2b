"""Rows of preferences in every shape, and the sentence that a row gets which is none."""

import copy
import json
import random
import re

import pytest

from tuner.data.answers import IncomparableError
from tuner.data.conversation import Preference, ToolCall, Turn
from tuner.data.preference_rows import SHAPES, join_answers, preference_reader
from tuner.data.row_files import Row
from tuner.data.row_shapes import recognize
from tuner.data.turns import Cell
from tuner.errors import UserError
from tuner.resources import row_examples_folder

SHAPE_OF = {
    "pair_reference": "pair",
    **dict.fromkeys(("pair", "pair_messages", "hh", "rewardbench2", "distilabel", "ultrainteract"), "pair"),
    **dict.fromkeys(("ranked", "distilabel_ratings"), "ranked"),
    **{name: name for name in ("shp", "safe_rlhf", "safe_rlhf_safer", "helpsteer2", "helpsteer3", "arena")},
    **{name: name for name in ("arena_texts", "tldr", "swift", "output_pair")},
}
"""Name of an example file -> the shape it is recognized as."""
FILES = [row_examples_folder() / f"{name}.jsonl" for name in SHAPE_OF]
EXAMPLES = [
    (file.stem, json.loads(line)) for file in FILES for line in file.read_text(encoding="utf-8").splitlines()
]


def read(row, shape=None) -> Preference:
    return preference_reader(shape).read(row, "x.jsonl:7")


def user(text="Q", **more):
    return {"role": "user", "content": text, **more}


def assistant(text="A", **more):
    return {"role": "assistant", "content": text, **more}


def texts(preference: Preference) -> list[str]:
    """The answers, which are one turn each."""
    assert all(len(answer) == 1 and answer[0].role == "assistant" for answer in preference.answers)
    return [answer[0].content for answer in preference.answers]


def contents(turns) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in turns]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_example_file_is_recognized_and_read(file):
    rows = [row for name, row in EXAMPLES if name == file.stem]
    assert 2 <= len(rows) <= 6
    assert recognize(rows[0], "x", SHAPES) == SHAPE_OF[file.stem]
    reader = preference_reader(None)
    for row, _ in join_answers([Row("x", 1, row) for row in rows], reader):
        preference = reader.read(row.values, "x:1")
        assert len(preference.answers) == len(preference.ranks) >= 2
        assert preference.ranks[0] == 0
        assert list(preference.ranks) == sorted(preference.ranks)


def test_every_shape_has_an_example_file():
    assert set(SHAPES) == set(SHAPE_OF.values())


PLAIN = Preference(
    prompt=(Turn("user", "Q"),),
    answers=((Turn("assistant", "good"),), (Turn("assistant", "bad"),)),
    ranks=(0, 1),
    origin="x.jsonl:7",
)
SAME = {
    "texts": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "messages": {"prompt": [user()], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
    "answers as a message": {"prompt": [user()], "chosen": assistant("good"), "rejected": assistant("bad")},
    "UltraFeedback": {
        "prompt": "Q",
        "prompt_id": "0",
        "chosen": [user(), assistant("good")],
        "rejected": [user(), assistant("bad")],
        "messages": [user(), assistant("good")],
        "score_chosen": 8.0,
        "score_rejected": 7.5,
    },
    "TRL's implicit prompt": {"chosen": [user(), assistant("good")], "rejected": [user(), assistant("bad")]},
    "HH-RLHF": {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
    "HH-RLHF with the prompt apart": {
        "prompt": "\n\nHuman: Q\n\nAssistant:",
        "chosen": " good".strip(),
        "rejected": "bad",
    },
    "HH-RLHF with the prompt apart and in both": {
        "prompt": "\n\nHuman: Q\n\nAssistant:",
        "chosen": "\n\nHuman: Q\n\nAssistant: good",
        "rejected": "\n\nHuman: Q\n\nAssistant: bad",
    },
    "LLaMA-Factory's ShareGPT": {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "LLaMA-Factory's Alpaca": {"instruction": "Q", "input": "", "chosen": "good", "rejected": "bad"},
    "Intel's Orca pairs": {"system": "", "question": "Q", "chosen": "good", "rejected": "bad"},
    "SHP, A better": {"history": "Q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1},
    "SHP, B better": {"history": "Q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0},
    "ranks": {"prompt": "Q", "answers": ["bad", "good"], "ranks": [2, 1]},
    "scores": {"prompt": "Q", "responses": ["bad", "good"], "scores": [-1, 0.5]},
    "Nectar": {
        "prompt": "\n\nHuman: Q\n\nAssistant: ",
        "answers": [{"answer": "good", "rank": 1.0, "model": "m"}, {"answer": "bad", "rank": 6.0}],
    },
    "UltraFeedback's completions": {
        "instruction": "Q",
        "completions": [
            {"response": "bad", "overall_score": 1.0, "model": "m"},
            {"response": "good", "overall_score": 7.5},
        ],
    },
    "ranked messages": {"prompt": [user()], "answers": [assistant("bad"), assistant("good")], "ranks": [9, 3]},
    "several texts": {"prompt": "Q", "chosen": ["good"], "rejected": ["bad"]},
    "Argilla's UltraFeedback": {
        "instruction": "Q", "chosen_response": "good", "rejected_response": "bad",
        "chosen_avg_rating": 4.5, "rejected_avg_rating": 2.0,
    },
    "messages and answers apart": {
        "messages": [user()], "chosen_response": assistant("good"), "rejected_response": assistant("bad"),
    },
    "distilabel": {"system": None, "input": "Q", "chosen": "good", "rejected": "bad", "status": "swapped"},
    "distilabel's ratings": {"instruction": "Q", "generations": ["bad", "good"], "ratings": [1, 4]},
    "UltraInteract": {"trajectory": [{"from": "user", "value": "Q"}], "chosen": "good", "rejected": "bad"},
    "PKU-SafeRLHF": {
        "prompt": "Q", "response_0": "bad", "response_1": "good", "better_response_id": 1, "safer_response_id": 1,
    },
    "HelpSteer2, put together": {"prompt": "Q", "response": ["bad", "good"], "helpfulness": [1, 4]},
    "HelpSteer2's preferences": {
        "prompt": "Q", "response_1": "good", "response_2": "bad", "preference_strength": -1,
    },
    "HelpSteer3": {"context": [user()], "response1": "bad", "response2": "good", "overall_preference": 3},
    "Chatbot Arena": {
        "winner": "model_b",
        "conversation_a": [user(), assistant("bad")],
        "conversation_b": [user(), assistant([{"type": "text", "text": "good", "image": None}])],
    },
    "MT-Bench's first turn": {
        "winner": "model_a", "turn": 1,
        "conversation_a": [user(), assistant("good"), user("R"), assistant("A")],
        "conversation_b": [user(), assistant("bad"), user("R"), assistant("B")],
    },
    "Chatbot Arena on Kaggle": {
        "prompt": '["Q"]', "response_a": '["bad"]', "response_b": '["good"]',
        "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0,
    },
    "ms-swift": {"messages": [user(), assistant("good")], "rejected_response": "bad"},
    "ms-swift's messages": {
        "messages": [user(), assistant("good")], "rejected_messages": [user(), assistant("bad")],
    },
    "ms-swift's response": {"messages": [user()], "response": "good", "rejected_response": "bad"},
    "ms-swift's query": {"query": "Q", "response": "good", "rejected_response": "bad"},
    "LLaMA-Factory's outputs": {"instruction": "Q", "input": "", "output": ["good", "bad"]},
    "cells of CSV": {
        "prompt": Cell("Q"), "chosen": Cell("good"), "rejected": Cell("bad"),
        "score_chosen": Cell("10"), "score_rejected": Cell("9.5"), "margin": Cell("0"), "weight": Cell("1.0"),
    },
    "messages in cells of CSV": {
        "prompt": Cell(json.dumps([user()])), "chosen": Cell(json.dumps([assistant("good")])),
        "rejected": Cell(json.dumps([user(), assistant("bad")])),
    },
    "Parquet's nulls": {
        "prompt": "Q", "messages": None, "system": None, "chosen": "good", "rejected": "bad", "condition": None,
        "margin": None, "weight": None, "tools": None, "score_chosen": None, "score_rejected": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_every_way_to_write_a_pair_is_the_same_pair(case):
    preference = read(SAME[case])
    assert (preference.prompt, preference.answers, preference.ranks) == (
        PLAIN.prompt,
        PLAIN.answers,
        PLAIN.ranks,
    )
    assert (preference.condition, preference.margin, preference.weight) == (None, 0.0, 1.0)
    assert preference.origin == "x.jsonl:7"


def test_what_single_sets_mean():
    tldr = read(
        {
            "info": {"post": "P", "title": "T", "subreddit": "S"},
            "summaries": [{"text": " bad"}, {"text": " good\n"}],
            "choice": 1,
        }
    )
    assert contents(tldr.prompt) == [("user", "SUBREDDIT: r/S\n\nTITLE: T\n\nPOST: P\n\nTL;DR:")]
    assert texts(tldr) == ["good", "bad"]
    talk = "1\n<extra_id_1>Assistant\n2\n<extra_id_1>User\n3"
    steer = read({"prompt": talk, "response_1": "bad", "response_2": "good", "preference_strength": 1})
    assert contents(steer.prompt) == [("user", "1"), ("assistant", "2"), ("user", "3")]
    arena = read(
        {
            "winner": "model_b",
            "turn": 2,
            "conversation_a": [user(), assistant("a"), user("R"), assistant("b")],
            "conversation_b": [user(), assistant("c"), user("R"), assistant("d")],
        }
    )
    assert contents(arena.prompt) == [("user", "Q")]
    assert [contents(answer) for answer in arena.answers] == [
        [("assistant", "c"), ("user", "R"), ("assistant", "d")],
        [("assistant", "a"), ("user", "R"), ("assistant", "b")],
    ]
    several = read({"prompt": "Q", "chosen": ["a", "b"], "rejected": ["c", "d"]})
    assert (texts(several), several.ranks) == (["a", "b", "c", "d"], (0, 0, 1, 1))


@pytest.mark.parametrize(
    "row",
    [
        {**SAME["Chatbot Arena"], "winner": "tie"},
        {**SAME["Chatbot Arena"], "winner": "tie (bothbad)"},
        {**SAME["Chatbot Arena"], "winner": "both_bad"},
        {**SAME["Chatbot Arena on Kaggle"], "winner_model_b": 0, "winner_tie": 1},
        {**SAME["HelpSteer3"], "overall_preference": 0},
        {**SAME["HelpSteer2, put together"], "helpfulness": [3, 3]},
        {**SAME["distilabel"], "status": "tie"},
        {**SAME["distilabel's ratings"], "ratings": [5, 5]},
    ],
)
def test_ties_of_published_sets(row):
    assert read(row).ranks == (0, 0)


def test_safety_is_ranked_by_when_named_and_told_of_when_not():
    row = {**SAME["PKU-SafeRLHF"], "safer_response_id": 0}
    assert texts(read(row)) == ["good", "bad"]
    assert read(row).remarks == (
        'name another answer the safer one than the better one; Source(shape="safe_rlhf_safer") ranks by safety',
    )
    assert texts(read(row, "safe_rlhf_safer")) == ["bad", "good"]
    assert read(row, "safe_rlhf_safer").remarks == read(SAME["PKU-SafeRLHF"]).remarks == ()


def rated(response: str, overall: float, *ratings: str, **more):
    aspects = {f"aspect {number}": {"Rating": rating} for number, rating in enumerate(ratings)}
    return {
        "response": response,
        "overall_score": overall,
        **({"annotations": aspects} if aspects else {}),
        **more,
    }


def test_ultrafeedback_is_ranked_by_its_fine_grained_scores():
    """Its overall score is 10 in some 2,000 answers that deserve 1."""
    better, worse = {"fine-grained_score": 4.75}, {"fine-grained_score": 1.25}
    answers = [rated("bad", 10.0, **worse), rated("good", 7.5, **better)]
    preference = read({"instruction": "Q", "completions": answers})
    assert texts(preference) == ["good", "bad"]
    assert preference.remarks == (
        "are ranked by UltraFeedback's fine-grained scores: its overall_score is 10 in some where 1 was meant",
    )
    answers = [rated("bad", 10.0, "1", "2", "N/A"), rated("good", 7.5, "4", "5", "5")]  # the first version
    assert texts(read({"instruction": "Q", "completions": answers})) == ["good", "bad"]
    answers = [rated("good", 10.0, "1"), rated("bad", 7.5)]  # not comparable: one has no ratings
    assert texts(read({"instruction": "Q", "completions": answers})) == ["good", "bad"]
    assert read({"instruction": "Q", "completions": answers}).remarks == ()


def test_answers_of_one_row_each_are_put_together_by_prompt():
    def rows(*values):
        return [Row("x", line, row) for line, row in enumerate(values, 1)]

    def one(prompt, response, helpfulness, **more):
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **more}

    reader = preference_reader(None)
    joined = list(
        join_answers(
            rows(one("Q", "bad", 1), one("R", "c", 2), one("Q", "good", 4), one("Q", "x", 3, condition="c")),
            reader,
        )
    )
    assert [(row.line, number) for row, number in joined] == [(1, 2), (2, 1), (4, 1)]
    assert texts(reader.read(joined[0][0].values, "x:1")) == ["good", "bad"]
    with pytest.raises(IncomparableError, match="x:2: two different answers are needed"):
        reader.read(joined[1][0].values, joined[1][0].origin)
    for bad, message in (
        (one("Q", 3, 1), "x:2: a message is not an object but 3"),
        (one("Q", "a", "4"), "x:2: \"helpfulness\" is a number, not '4'"),
    ):
        with pytest.raises(UserError, match=message):
            list(join_answers(rows(one("Q", "a", 1), bad), preference_reader(None)))
    apart = rows(SAME["texts"], SAME["texts"])
    assert list(join_answers(apart, preference_reader(None))) == [(row, 1) for row in apart]


def test_condition_margin_and_weight():
    row = {**SAME["texts"], "condition": "brief", "margin": 1, "weight": 0.5}
    preference = read(row)
    assert (preference.condition, preference.margin, preference.weight) == ("brief", 1.0, 0.5)


def test_longer_prompts():
    alpaca = read(
        {"instruction": "C", "input": "D", "history": [["A", "B"]], "chosen": "good", "rejected": "bad"}
    )
    assert contents(alpaca.prompt) == [("user", "A"), ("assistant", "B"), ("user", "C\nD")]
    assert alpaca.prompt[-1].input == "D"
    talk = "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\nmore\n\nand more"
    hh = read({"chosen": f"{talk}\n\nAssistant: good\n\nreally", "rejected": f"{talk}\n\nAssistant: bad"})
    assert contents(hh.prompt) == [("user", "A"), ("assistant", "B"), ("user", "C\nmore\n\nand more")]
    assert texts(hh) == ["good\n\nreally", "bad"]
    implicit = read(
        {
            "chosen": [user("A"), assistant("B"), user("C"), assistant("good")],
            "rejected": [user("A"), assistant("B"), user("C"), assistant("bad")],
        }
    )
    assert contents(implicit.prompt) == [("user", "A"), ("assistant", "B"), ("user", "C")]


@pytest.mark.parametrize(
    "case", ["texts", "TRL's implicit prompt", "HH-RLHF", "ranks", "LLaMA-Factory's Alpaca"]
)
def test_a_rows_own_system_turn_opens_the_prompt(case):
    preference = read({**SAME[case], "system": "S"})
    assert contents(preference.prompt) == [("system", "S"), ("user", "Q")]
    assert texts(preference) == ["good", "bad"]


def test_system_turns_in_messages():
    system = {"role": "system", "content": "S"}
    preference = read(
        {"prompt": [system, user()], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    )
    assert contents(preference.prompt) == [("system", "S"), ("user", "Q")]
    preference = read(
        {"chosen": [system, user(), assistant("g")], "rejected": [system, user(), assistant("b")]}
    )
    assert contents(preference.prompt) == [("system", "S"), ("user", "Q")]


def test_answers_may_have_several_turns_and_calls():
    call = {"name": "add", "arguments": {"a": 1}}
    good = [assistant("", tool_calls=[call]), {"role": "tool", "content": "2"}, assistant("2")]
    preference = read(
        {"prompt": [user()], "chosen": good, "rejected": [assistant("3")], "tools": [{"name": "add"}]}
    )
    assert [turn.role for turn in preference.answers[0]] == ["assistant", "tool", "assistant"]
    assert preference.answers[0][0].tool_calls == (ToolCall("add", {"a": 1}),)
    assert preference.tools == ({"type": "function", "function": {"name": "add"}},)


def test_switches_of_turns_do_not_hide_where_the_answer_begins():
    """A turn's own weight or switch, left from fine-tuning, must not hide where the answer begins."""
    preference = read(
        {
            "prompt": [user(learn=True, weight=3.0)],
            "chosen": [assistant("good", weight=0.0)],
            "rejected": [assistant("bad", learn=False)],
        }
    )
    for answer in range(2):
        prompt, turn = preference.conversation(answer).turns
        assert prompt.learn is False
        assert (turn.learn, turn.weight) == (None, 1.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_rating", "rejected_rating"),
        ("rating_chosen", "rating_rejected"),
        ("chosen_avg_rating", "rejected_avg_rating"),
    ],
)
def test_equal_scores_are_a_tie(one, other):
    assert read({**SAME["texts"], one: 7.5, other: 7.5}).ranks == (0, 0)
    assert read({**SAME["texts"], one: 7.5, other: 7.0}).ranks == (0, 1)
    assert read({**SAME["texts"], one: 7.5, other: None}).ranks == (0, 1)
    with pytest.raises(
        IncomparableError, match=f'"{one}" 2 is less than "{other}" 8, which contradicts the pair'
    ):
        read({**SAME["texts"], one: 2.0, other: 8.0})


def test_ranked_lists_are_sorted_and_ties_kept():
    row = {"prompt": "Q", "answers": ["c", "a", "b", "d"], "ranks": [7, 1, 7, 9]}
    preference = read(row)
    assert texts(preference) == ["a", "c", "b", "d"]
    assert preference.ranks == (0, 1, 1, 2)
    scored = read({"prompt": "Q", "answers": ["c", "a", "b", "d"], "scores": [0.0, 5.5, 0, -3]})
    assert (texts(scored), scored.ranks) == (texts(preference), preference.ranks)
    assert read({"prompt": "Q", "answers": ["a", "b"], "ranks": [0, 0]}).ranks == (0, 0)


def test_the_same_answer_twice_counts_once():
    preference = read({"prompt": "Q", "answers": ["a", "b", "a ", "c"], "scores": [3, 2, 3, 1]})
    assert texts(preference) == ["a", "b", "c"]
    assert preference.ranks == (0, 1, 2)


def test_a_users_function(tmp_path):
    file = tmp_path / "shapes.py"
    file.write_text(
        "def mine(row):\n    return {'prompt': row['q'], 'chosen': row['+'], 'rejected': row['-']}\n"
    )
    preference = read({"q": "Q", "+": "good", "-": "bad"}, f"{file}:mine")
    assert (contents(preference.prompt), texts(preference)) == ([("user", "Q")], ["good", "bad"])


TALK = "\n\nHuman: Q\n\nAssistant: "
INCOMPARABLE = {
    "identical texts": ({**SAME["texts"], "rejected": "good "}, "the same answer is both better and worse"),
    "identical messages": (
        {"chosen": [user(), assistant()], "rejected": [user(), assistant()]},
        "the same answer is both better and worse",
    ),
    "identical and tied": (
        {**SAME["texts"], "rejected": "good", "score_chosen": 1, "score_rejected": 1},
        "two different answers are needed",
    ),
    "one answer in all": ({"prompt": "Q", "answers": ["a", "a"], "ranks": [1, 1]}, "two different answers"),
    "one answer": ({"prompt": "Q", "answers": ["a"], "ranks": [1]}, "two different answers are needed"),
    "no answers": ({"prompt": "Q", "answers": []}, "two different answers are needed"),
    "better and worse": (
        {"prompt": "Q", "answers": ["a", "b", "a"], "ranks": [1, 2, 3]},
        "the same answer is both better and worse",
    ),
    "ranks against scores": (
        {"prompt": "Q", "answers": ["a", "b", "c"], "ranks": [1, 2, 3], "scores": [3, 1, 2]},
        "rank 2 (1 is the best) has a lower score than rank 3",
    ),
    "ranks against scores in each": (
        {
            "prompt": "Q",
            "answers": [{"text": "a", "rank": 1, "score": 0}, {"text": "b", "rank": 2, "score": 1}],
        },
        "ranks and scores contradict each other",
    ),
    "SHP's scores": (
        {**SAME["SHP, A better"], "score_A": 2, "score_B": 30},
        '"labels" 1 contradicts "score_A" 2 and "score_B" 30',
    ),
    "an empty better answer": ({**SAME["texts"], "chosen": " \n"}, "the better answer is empty"),
    "an empty first of a list": (
        {"prompt": "Q", "answers": ["", "b", "c"], "ranks": [1, 1, 2]},
        "the better answer is empty",
    ),
    "other prompts": (
        {"chosen": [user("Q"), assistant()], "rejected": [user("R"), assistant()]},
        "share no prompt",
    ),
    "other last questions": (
        {
            "chosen": [user(), assistant(), user("C"), assistant("good")],
            "rejected": [user(), assistant(), user("D"), assistant("bad")],
        },
        "part at turn 3, which is the user's",
    ),
    "other transcripts": (
        {"chosen": TALK + "A", "rejected": "\n\nHuman: R\n\nAssistant: B"},
        "share no prompt",
    ),
    "another prompt in one": (
        {"prompt": "Q", "chosen": [user("R"), assistant()], "rejected": [user(), assistant("B")]},
        '"chosen" begins with another prompt than the row has',
    ),
    "another transcript in one": (
        {"prompt": [user(), assistant(), user("R")], "chosen": [user(), assistant("B")], "rejected": "C"},
        '"chosen" begins with another prompt',
    ),
    "more questions in one": (
        {"prompt": "Q", "chosen": [user(), user("R"), assistant()], "rejected": "B"},
        '"chosen" has a user turn behind the prompt',
    ),
}
BAD = {
    "no prompt for texts": ({"chosen": "a", "rejected": "b"}, '"chosen" is a text and there is no prompt'),
    "empty prompt": ({**SAME["texts"], "prompt": " "}, "the prompt is empty"),
    "empty prompt beside a system text": ({**SAME["texts"], "prompt": "", "system": "S"}, "the prompt is empty"),
    "empty history": ({**SAME["SHP, A better"], "history": ""}, "the prompt is empty"),
    "empty question": ({**SAME["Intel's Orca pairs"], "question": "\n"}, "the prompt is empty"),
    "empty instruction": ({**SAME["LLaMA-Factory's Alpaca"], "instruction": ""}, "the prompt is empty"),
    "empty message": ({"prompt": [user("")], "chosen": "a", "rejected": "b"}, "the prompt is empty"),
    "no messages": ({"prompt": [], "chosen": "a", "rejected": "b"}, '"prompt" is empty'),
    "prompt a number": ({**SAME["texts"], "prompt": 3}, '"prompt" is not a text'),
    "prompt an object": ({**SAME["texts"], "prompt": user()}, '"prompt" is not a text'),
    "answer a number": ({**SAME["texts"], "chosen": 3}, "a message is not an object but 3"),
    "answer no messages": ({**SAME["texts"], "chosen": []}, '"chosen" does not end with an answer'),
    "answer of a user": ({"prompt": "Q", "chosen": [user()], "rejected": "b"}, '"chosen" does not end with'),
    "ends with a user": (
        {"chosen": [user(), assistant(), user("R")], "rejected": [user(), assistant("B")]},
        '"chosen" does not end with an answer',
    ),
    "transcript without an answer": (
        {"chosen": "\n\nHuman: Q", "rejected": TALK + "b"},
        '"chosen" does not end with an answer',
    ),
    "unknown role": ({**SAME["texts"], "chosen": [{"role": "cat", "content": "x"}]}, "unknown role 'cat'"),
    "unhashable role": ({**SAME["texts"], "chosen": [{"from": [], "value": "x"}]}, "unknown role"),
    "content missing": ({**SAME["texts"], "chosen": [{"role": "assistant"}]}, '"content" is missing'),
    "condition a number": ({**SAME["texts"], "condition": 3}, '"condition" is the name of one, not 3'),
    "condition a list": ({**SAME["texts"], "condition": ["a"]}, '"condition" is the name of one'),
    "condition empty": ({**SAME["texts"], "condition": ""}, '"condition" is the name of one'),
    "margin negative": ({**SAME["texts"], "margin": -0.5}, '"margin" is a number of at least 0, not -0.5'),
    "margin a text": ({**SAME["texts"], "margin": "1"}, '"margin" is a number of at least 0'),
    "margin a switch": ({**SAME["texts"], "margin": True}, '"margin" is a number of at least 0'),
    "margin not finite": ({**SAME["texts"], "margin": float("inf")}, '"margin" is a number of at least 0'),
    "margin huge": ({**SAME["texts"], "margin": 10**400}, '"margin" is a number of at least 0'),
    "margin of a list": (
        {"prompt": "Q", "answers": ["a", "b", "c"], "ranks": [1, 2, 3], "margin": 1.0},
        '"margin" belongs to a pair',
    ),
    "weight negative": ({**SAME["texts"], "weight": -1}, '"weight" is a number of at least 0, not -1'),
    "weight not a number": ({**SAME["texts"], "weight": float("nan")}, '"weight" is a number of at least 0'),
    "weight huge": ({**SAME["texts"], "weight": 10**400}, '"weight" 1000.* is out of the range of fp32'),
    "weight tiny": ({**SAME["texts"], "weight": 1e-60}, '"weight" 1e-60 is out of the range of fp32'),
    "labels": ({**SAME["SHP, A better"], "labels": 2}, '"labels" is 1 where A is better and 0 where B is, not 2'),
    "labels a text": ({**SAME["SHP, A better"], "labels": "1"}, '"labels" is 1 where'),
    "too few ranks": ({"prompt": "Q", "answers": ["a", "b"], "ranks": [1]}, "must be a list of 2 numbers"),
    "too many ranks": ({"prompt": "Q", "answers": ["a", "b"], "ranks": [1, None, 2]}, "a list of 2 numbers"),
    "ranks a number": ({"prompt": "Q", "answers": ["a", "b"], "ranks": 3}, '"ranks" or "scores" is not a list'),
    "scores a text": ({"prompt": "Q", "answers": ["a", "b"], "scores": "ab"}, "is not a list"),
    "scores of texts": ({"prompt": "Q", "answers": ["a", "b"], "scores": ["1", "2"]}, "a list of 2 numbers"),
    "scores huge": ({"prompt": "Q", "answers": ["a", "b"], "scores": [10**400, 1]}, "a list of 2 numbers"),
    "no ranks": ({"prompt": "Q", "answers": ["a", "b"]}, "must be a list of 2 numbers, one for each answer"),
    "half the ranks inside": (
        {"prompt": "Q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
        "a list of 2 numbers",
    ),
    "answers no list": ({"prompt": "Q", "answers": "ab", "ranks": [1, 2]}, '"answers" is not a list'),
    "answers without a text": (
        {"prompt": "Q", "answers": [{"rank": 1}, {"rank": 2}]},
        "a message is not an object but None",
    ),
    "list without a prompt": ({"answers": ["a", "b"], "ranks": [1, 2]}, "no prompt; write one of prompt, messages"),
    "system a number": ({**SAME["texts"], "system": 3}, '"system" is not a text'),
    "tools": ({**SAME["texts"], "tools": "x"}, '"tools" is text but not JSON'),
    "alpaca history": ({**SAME["LLaMA-Factory's Alpaca"], "history": ["x"]}, '"history" is a list of'),
    "better_response_id": (
        {**SAME["PKU-SafeRLHF"], "better_response_id": -1},
        '"better_response_id" is the number of a response, 0 or 1, not -1',
    ),
    "overall_preference": (
        {**SAME["HelpSteer3"], "overall_preference": "much"},
        "\"overall_preference\" is a number, not 'much'",
    ),
    "winner": ({**SAME["Chatbot Arena"], "winner": "model_c"}, '"winner" is model_a, model_b or tie, .*model_c'),
    "no vote": ({**SAME["Chatbot Arena on Kaggle"], "winner_model_b": 0}, "one of winner_model_a, .* must be 1"),
    "turns": ({**SAME["Chatbot Arena on Kaggle"], "prompt": '["Q", "R"]'}, "must have a text for each turn"),
    "turns no list": ({**SAME["Chatbot Arena on Kaggle"], "response_a": "bad"}, '"response_a" is not a list'),
    "summaries": ({"info": {"post": "P"}, "summaries": [], "choice": 0}, '"summaries" has 0 summaries'),
    "no post": ({"info": {}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}, "the prompt is empty"),
    "choice": ({"info": {"post": "P"}, "summaries": [{}, {}], "choice": 2}, '"choice" is the number of a summary'),
    "messages end with a question": (
        {"messages": [user()], "rejected_response": "bad"},
        '"messages" does not end with the better answer',
    ),
    "three outputs": ({"instruction": "Q", "output": ["a", "b", "c"]}, '"output" has 3 answers'),
    "half a character": ({**SAME["texts"], "chosen": "a \ud83d"}, '"chosen" has .*half of a character'),
    "unknown shape": ({"prompt": "Q", "chosen": "a"}, r"shape is unknown \(keys: prompt, chosen\); it needs"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPARABLE)
def test_answers_that_cannot_be_compared_say_where_and_why(case):
    row, message = INCOMPARABLE[case]
    with pytest.raises(IncomparableError, match=f"^x.jsonl:7: .*{re.escape(message)}"):
        read(row)


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_say_where_and_what(case):
    row, message = BAD[case]
    with pytest.raises(UserError, match=f"^x.jsonl:7: .*{message}") as error:
        read(row)
    assert not isinstance(error.value, IncomparableError)
    assert "\n" not in str(error.value)


def test_later_rows_keep_the_shape_of_the_first():
    reader = preference_reader(None)
    reader.read(SAME["texts"], "x:1")
    with pytest.raises(
        UserError, match=r"x:2: not a pair row .*first row\): it needs \"chosen\"\+\"rejected\""
    ):
        reader.read(SAME["ranks"], "x:2")
    with pytest.raises(UserError, match="named in the config"):
        read(SAME["texts"], "ranked")


WRONG = (None, True, 0, -1, 2.5, 10**400, float("nan"), "", " ", "x", TALK, [], ["x"], [None], [[]], {}, {"role": 1},
         [{"role": "user", "content": "Q"}], {"from": "gpt", "value": 1}, [{"content": "x"}], [1, 2], [1])  # fmt: skip


def damaged(row, generator: random.Random):
    """A copy in which one value, however deep, is another, or absent, or stands in a list, or is doubled."""
    row = copy.deepcopy(row)
    places, stack = [], [row]
    while stack:
        part = stack.pop()
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            stack += [part[key]] if isinstance(part[key], dict | list) else []
    part, key = generator.choice(places)
    change = generator.randrange(8)
    if change == 0:
        del part[key]
    elif change == 1:
        part[key] = [part[key]]
    elif change == 2 and isinstance(part[key], list):
        part[key] = part[key] * 2
    elif change == 3:
        part[key] = {"content": part[key], "role": "assistant"}
    else:
        part[key] = copy.deepcopy(generator.choice(WRONG))
    return row


def outcome(row) -> tuple[Preference | None, str]:
    """The preference of a row, or its error message."""
    try:
        return read(row), ""
    except UserError as error:
        return None, str(error)


def test_no_row_ends_in_anything_but_a_preference_or_a_sentence():
    generator = random.Random(0)
    rows = [row for _, row in EXAMPLES] + list(SAME.values())
    rows += [{**row, **row_scores} for row in rows for row_scores in ({"scores": [1, 2]}, {"ranks": [2, 1]})]
    rows += [{**SAME["texts"], "margin": 1.0, "weight": 2.0, "condition": "c", "tools": [{"name": "f"}]}]
    refused = 0
    for _ in range(6000):
        row = generator.choice(rows)
        for _ in range(generator.randrange(1, 4)):
            row = damaged(row, generator) if row else row
        preference, message = outcome(row)
        if preference is None:
            refused += 1
            assert message.startswith("x.jsonl:7: ")
            assert "\n" not in message
        else:
            assert len(preference.answers) == len(set(map(repr, preference.answers))) >= 2
            assert all(answer[0].role == "assistant" == answer[-1].role for answer in preference.answers)
            assert any(turn.content.strip() for turn in preference.prompt)
    assert 1000 < refused < 6000
