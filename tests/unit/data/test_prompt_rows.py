"""Rows of every shape as prompts, and the sentence that a row gets which asks nothing."""

import copy
import json

import pytest

from tests.unit.data.test_preference_rows import SHAPE_OF as PREFERENCE_FILES
from tuner.data.conversation import Preference, Prompt, ToolCall, Turn
from tuner.data.conversation_rows import SHAPES as CONVERSATIONS
from tuner.data.prompt_rows import SHAPES, prompt_reader
from tuner.data.row_shapes import recognize
from tuner.errors import UserError
from tuner.resources import row_examples_folder

SHAPE_OF = {
    "prompt_messages": "messages",
    "messages_tools": "messages",
    "internlm2": "messages",
    "xtuner": "sharegpt",
    **PREFERENCE_FILES,
    "prompt_completion": "prompt",
    "labeled": "prompt",
}
FILES = [file for file in sorted(row_examples_folder().glob("*.jsonl")) if file.stem != "text"]


def read(row, shape=None) -> Prompt:
    return prompt_reader(shape).read(row, "x.jsonl:7")


def user(text="Q"):
    return {"role": "user", "content": text}


def assistant(text="A", **more):
    return {"role": "assistant", "content": text, **more}


def contents(prompt: Prompt) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in prompt.turns]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_example_file_asks_something(file):
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert recognize(rows[0], "x", SHAPES) == SHAPE_OF.get(file.stem, file.stem)
    reader = prompt_reader(None)
    for row in rows:
        prompt = reader.read(row, "x:1")
        assert prompt.turns[-1].role != "assistant"
        assert any(turn.role == "user" for turn in prompt.turns)


def test_every_shape_has_an_example_file():
    shapes = {SHAPE_OF.get(file.stem, file.stem) for file in FILES}
    assert set(SHAPES) == shapes | {"prompt_completion"}
    assert set(CONVERSATIONS) - {"text"} < set(SHAPES)


UNANSWERED = {
    "a text": {"prompt": "Q"},
    "messages": {"prompt": [user()]},
    "one message of text parts": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]},
    "ShareGPT's messages": {"prompt": [{"from": "human", "value": "Q"}]},
    "a transcript": {"prompt": "\n\nHuman: Q\n\nAssistant:"},
    "question": {"question": "Q"},
    "messages without an answer": {"messages": [user()]},
    "ShareGPT without an answer": {"conversations": [{"from": "human", "value": "Q"}]},
    "Alpaca without an answer": {"instruction": "Q"},
    "Alpaca with an empty answer": {"instruction": "Q", "output": ""},
    "a pair": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "a pair whose answers are the same": {"prompt": "Q", "chosen": "same", "rejected": "same"},
    "a pair with the prompt in both": {
        "chosen": [user(), assistant("good")],
        "rejected": [user(), assistant("bad")],
    },
    "HH-RLHF": {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
    "SHP": {"history": "Q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1},
    "ranked": {"prompt": "Q", "answers": ["good", "bad"], "ranks": [1, 2]},
    "an arena's conversations": {
        "winner": "tie", "conversation_a": [user(), assistant("a")], "conversation_b": [user(), assistant("b")],
    },
    "HelpSteer's answer": {"prompt": "Q", "response": "A", "helpfulness": 0},
    "ms-swift's pair": {"messages": [user(), assistant("good")], "rejected_response": "bad"},
    "LLaMA-Factory's outputs": {"instruction": "Q", "output": ["good", "bad"]},
    "several true answers, not ranked": {"question": "Q", "answers": ["one", "another"]},
    "an answer that is a number": {"question": "Q", "answer": 42},
    "Parquet's nulls": {
        "prompt": "Q", "system": None, "completion": None, "tools": None, "reference": None, "answer": None,
        "condition": None, "weight": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", UNANSWERED)
def test_shapes_that_ask_the_same(case):
    row = UNANSWERED[case]
    assert read(row) == Prompt((Turn("user", "Q"),), values=row, origin="x.jsonl:7")


ANSWERED = {
    "prompt and completion": {"prompt": "Q", "completion": "A"},
    "prompt and response": {"prompt": "Q", "response": "A"},
    "messages apart": {"prompt": [user()], "completion": [assistant()]},
    "messages": {"messages": [user(), assistant()]},
    "messages under prompt": {"prompt": [user(), assistant()]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "XTuner": {"conversation": [{"input": "Q", "output": "A"}]},
    "Alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "reference": {"prompt": "Q", "reference": "A"},
    "GSM8K": {"question": "Q", "answer": "A"},
    "a reference beside a pair": {"prompt": "Q", "chosen": "good", "rejected": "bad", "reference": "A"},
    "a reference beside an answer": {"messages": [user(), assistant("worse")], "reference": "A"},
}


@pytest.mark.parametrize("case", ANSWERED)
def test_the_answer_in_a_row_is_the_reference(case):
    row = ANSWERED[case]
    assert read(row) == Prompt((Turn("user", "Q"),), reference="A", values=row, origin="x.jsonl:7")


@pytest.mark.parametrize("case", [*UNANSWERED, *ANSWERED])
def test_reading_changes_no_row(case):
    row = {**UNANSWERED, **ANSWERED}[case]
    before = copy.deepcopy(row)
    read(row)
    assert row == before


def test_an_answer_that_is_called_undesirable_is_no_reference():
    row = {"prompt": "Q", "completion": "A", "label": True}
    references = [
        prompt_reader(None).read({**row, "label": label}, "x:1").reference for label in (True, False)
    ]
    assert references == ["A", None]


def test_a_file_may_hold_prompts_with_and_without_completion():
    reader = prompt_reader(None)
    references = [
        reader.read(row, "x:1").reference for row in ({"prompt": "Q"}, {"prompt": "Q", "response": "A"})
    ]
    assert references == [None, "A"]
    with pytest.raises(UserError, match=r'x:1: not a prompt_completion row .* needs "prompt"\+"completion"'):
        prompt_reader("prompt_completion").read({"prompt": "Q"}, "x:1")


def test_all_but_the_last_answer_is_asked():
    row = {"messages": [user("1"), assistant("2"), user("3"), assistant("4")]}
    assert contents(read(row)) == [("user", "1"), ("assistant", "2"), ("user", "3")]
    assert read(row).reference == "4"


def test_the_result_of_a_tool_is_answered():
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}, "id": "7"}
    result = {"role": "tool", "content": "2", "tool_call_id": "7"}
    prompt = read(
        {
            "messages": [user(), assistant(None, tool_calls=[call]), result, assistant("It is 2.")],
            "tools": [{"name": "add"}],
        }
    )
    assert [turn.role for turn in prompt.turns] == ["user", "assistant", "tool"]
    assert prompt.turns[1].tool_calls == (ToolCall("add", {"a": 1}, "7"),)
    assert prompt.tools == ({"type": "function", "function": {"name": "add"}},)
    assert prompt.reference == "It is 2."


def test_a_call_as_the_last_answer_is_no_text():
    call = {"function": {"name": "add", "arguments": {}}}
    assert read({"messages": [user(), assistant("", tool_calls=[call])]}).reference is None


@pytest.mark.parametrize(
    "row",
    [
        {"system": "S", "prompt": "Q"},
        {"system": "S", "messages": [user()]},
        {"system": "S", "instruction": "Q", "output": "A"},
        {"system": "S", "conversations": [{"from": "human", "value": "Q"}]},
        {"system": "S", "question": "Q", "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "system", "content": "S"}, user()]},
    ],
)
def test_a_rows_system_turn_comes_once(row):
    assert contents(read(row)) == [("system", "S"), ("user", "Q")]


def test_the_switches_of_learning_are_forgotten():
    row = {"messages": [user(), assistant(weight=3.0, learn=False), user("more")], "weight": 2.0}
    prompt = read(row)
    assert all((turn.learn, turn.weight) == (None, 1.0) for turn in prompt.turns)
    assert prompt.weight == 2.0


def test_chinese_and_input_stay_as_they_are():
    prompt = read({"instruction": "翻译成英文。", "input": "学而时习之，不亦说乎？", "condition": "简短"})
    assert prompt.turns == (
        Turn("user", "翻译成英文。\n学而时习之，不亦说乎？", input="学而时习之，不亦说乎？"),
    )
    assert prompt.condition == "简短"


def test_what_is_asked_and_what_is_judged():
    prompt = read({"messages": [user("1"), assistant("2"), user("3")]})
    conversation = Prompt(prompt.turns, system="Be kind.").policy_input()
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant", "user"]
    own = read({"system": "Own.", "prompt": "Q"})
    assert Prompt(own.turns, system="Be kind.").policy_input().turns == own.turns
    judged = Prompt(prompt.turns, system="Be kind.").with_answer("4")
    preference = Preference(prompt.turns, ((Turn("assistant", "4"),), (Turn("assistant", "5"),)), (0, 1))
    assert judged == preference.conversation(0)


BAD = {
    "raw text": ({"text": "Once upon a time"}, r"shape is unknown \(keys: text\); it needs .*messages"),
    "no keys": ({"a": 1}, "shape is unknown"),
    "an answer alone": (
        {"messages": [assistant()]},
        r"no user turn with a text to answer \(turns: assistant\)",
    ),
    "no turns": ({"messages": []}, r"no user turn with a text to answer \(turns: none\)"),
    "a system turn alone": ({"messages": [{"role": "system", "content": "S"}]}, "no user turn"),
    "blank": ({"prompt": " \n"}, "no user turn with a text"),
    "empty list": ({"prompt": []}, '"prompt" is empty'),
    "no text": ({"prompt": 3}, '"prompt" is not a text'),
    "role": ({"prompt": [{"role": "narrator", "content": "Q"}]}, "unknown role 'narrator'"),
    "condition": ({"prompt": "Q", "condition": 3}, '"condition" is the name of one, not 3'),
    "reference": ({"prompt": "Q", "reference": 42}, '"reference" is not a text'),
    "weight": ({"prompt": "Q", "weight": -1}, '"weight" is a number of at least 0'),
    "ranked without prompt": ({"answers": ["a", "b"], "ranks": [1, 2]}, 'no prompt; write it under "prompt"'),
    "texts without a prompt": ({"chosen": "a", "rejected": "b"}, '"chosen" is a text and there is no prompt'),
    "completion": ({"prompt": "Q", "completion": 3}, '"completion" is not a list'),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_ask_nothing_are_refused_with_their_place(case):
    row, message = BAD[case]
    with pytest.raises(UserError, match=rf"^x\.jsonl:7: .*{message}"):
        read(row)


def test_the_answer_of_a_rollout_is_no_reference():
    row = {"step": 1, "prompt": [user()], "answer": "wrong", "reference": None, "prompt_number": 0}
    prompt = read(row | {"condition": "polite"})
    assert (contents(prompt), prompt.reference, prompt.condition) == ([("user", "Q")], None, "polite")
    assert read(row | {"reference": "right"}).reference == "right"
