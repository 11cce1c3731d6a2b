"""Row shapes, and the sentence a row gets that has none."""

import datetime
import json
from decimal import Decimal

import datasets
import pytest

from tests.unit.data.test_preference_rows import SHAPE_OF as PREFERENCE_FILES
from tuner.config.data import Chat, Source
from tuner.data.conversation import Conversation, Document, Prompt, ToolCall, Turn
from tuner.data.conversation_rows import SHAPES, conversation_reader
from tuner.data.load_examples import load_examples
from tuner.data.rollout_rows import rollout_row
from tuner.data.row_shapes import recognize
from tuner.data.sources import Rows
from tuner.data.split import content_hash
from tuner.errors import UserError
from tuner.resources import row_examples_folder

PREFERENCES = set(PREFERENCE_FILES)
"""Example files of preferences: test_preference_rows.py reads them."""
PROMPTS = {"prompt", "prompt_messages"}
"""Example files of prompts: test_prompt_rows.py reads them."""
LABELED = {"labeled"}
"""Example files of labeled answers: tests/end_to_end/test_kto.py reads them."""
FILES = [
    file
    for file in sorted(row_examples_folder().glob("*.jsonl"))
    if file.stem not in PREFERENCES | PROMPTS | LABELED
]
SHAPE_OF = {"messages_tools": "messages", "internlm2": "messages", "xtuner": "sharegpt"}


def read(row, shape=None):
    return conversation_reader(shape).read(row, "x.jsonl:7")


def turns(row, shape=None) -> list[tuple[str, str]]:
    conversation = read(row, shape)
    assert isinstance(conversation, Conversation)
    return [(turn.role, turn.content) for turn in conversation.turns]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_example_file_is_recognized_and_read(file):
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    reader = conversation_reader()
    assert 2 <= len(rows) <= 6
    assert recognize(rows[0], "x", SHAPES) == SHAPE_OF.get(file.stem, file.stem)
    for row in rows:
        item = reader.read(row, "x.jsonl:1")
        assert isinstance(item, Document) == (file.stem == "text")


def test_every_shape_has_an_example_file():
    assert set(SHAPES) <= {file.stem for file in FILES}


def test_alpaca():
    assert turns({"instruction": "Add.", "input": "1 1", "output": "2"}) == [
        ("user", "Add.\n1 1"),
        ("assistant", "2"),
    ]
    row = {"instruction": "C", "input": "", "output": "D", "system": "S", "history": [["A", "B"]]}
    assert turns(row) == [
        ("system", "S"),
        ("user", "A"),
        ("assistant", "B"),
        ("user", "C"),
        ("assistant", "D"),
    ]
    assert read({"instruction": "Add.", "input": "1 1", "output": "2"}).turns[0].input == "1 1"


def test_sharegpt_with_calls():
    call = '{"name": "add", "arguments": {"a": 1}}'
    row = {
        "conversations": [
            {"from": "human", "value": "1+1"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2."},
        ],
        "tools": '[{"name": "add"}]',
    }
    conversation = read(row)
    assert [turn.role for turn in conversation.turns] == ["user", "assistant", "tool", "assistant"]
    assert conversation.turns[1].tool_calls == (ToolCall("add", {"a": 1}),)
    assert conversation.tools == ({"type": "function", "function": {"name": "add"}},)


def test_xtuner_and_roles_under_sharegpts_key():
    assert turns(
        {"conversation": [{"system": "S", "input": "A", "output": "B"}, {"input": "C", "output": "D"}]}
    ) == [
        ("system", "S"),
        ("user", "A"),
        ("assistant", "B"),
        ("user", "C"),
        ("assistant", "D"),
    ]
    row = {"conversations": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}
    assert turns(row) == [("user", "A"), ("assistant", "B")]


def test_prompt_completion_in_both_forms():
    assert turns({"prompt": "A", "completion": "B"}) == [("user", "A"), ("assistant", "B")]
    messages = {
        "prompt": [{"role": "user", "content": "A"}],
        "completion": [{"role": "assistant", "content": "B"}],
    }
    assert turns(messages) == [("user", "A"), ("assistant", "B")]


def test_in_tools_and_calls_what_json_has_not_is_text(tmp_path, tokenizer):
    """Parquet has dates, decimals and bytes, which a template could not write."""
    when = datetime.datetime(2026, 3, 1, 12, 30)
    arguments = {
        "day": datetime.date(2026, 3, 1),
        "price": Decimal("1.50"),
        "code": "Grüße".encode(),
        "count": 2,
    }
    tool = {"name": "book", "description": "Books.", "parameters": {"default": when}}
    messages = [
        {"role": "user", "content": "Book it.", "tool_calls": None},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "book", "arguments": arguments}}],
        },
    ]
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([{"messages": messages, "tools": [tool]}]).to_parquet(path)
    [row] = Rows(Source(path=path))
    conversation = conversation_reader().read(row.values, row.origin)
    [call] = conversation.turns[1].tool_calls
    assert call.arguments == {"day": "2026-03-01", "price": "1.50", "code": "Grüße", "count": 2}
    assert conversation.tools[0]["function"]["parameters"] == {"default": "2026-03-01 12:30:00"}
    data = load_examples(Chat(files=(path,), template="qwen", cache=str(tmp_path)), tokenizer)
    assert '"day": "2026-03-01"' in tokenizer.decode(data.train.example(0)[0])
    arguments["code"] = b"\xff"
    datasets.Dataset.from_list([{"messages": messages}]).to_parquet(path)
    with pytest.raises(
        UserError, match=r"rows\.parquet:1: a tool call has bytes that are no text \(b'\\xff'\)"
    ):
        load_examples(Chat(files=(path,), template="qwen", cache=str(tmp_path)), tokenizer)


def test_a_shape_of_ones_own_may_bring_such_values_too():
    turn = Turn("user", "a")
    first, second = (
        content_hash(
            Conversation((turn,), ({"function": {"name": "f", "since": datetime.date(2026, 3, day)}},))
        )
        for day in (1, 2)
    )
    assert first != second


def test_messages_with_tools_parts_names_and_parquets_nulls():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "S", "name": None, "tool_calls": None},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "1"},
            {"role": "environment", "content": "2", "name": "<|plugin|>"},
            {"role": "assistant", "content": "done"},
        ],
        "tools": None,
        "weight": None,
    }
    conversation = read(row)
    assert conversation.turns[:3] == (
        Turn("system", "S"),
        Turn("user", "ab"),
        Turn("assistant", "", tool_calls=(ToolCall("f", {"x": 1}, "1"),)),
    )
    assert conversation.turns[3].call_id == "1"
    assert conversation.turns[4].name == "<|plugin|>"


def test_weights_and_switches():
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "loss": False},
            {"role": "assistant", "content": "c", "train": True, "weight": 2},
            {"role": "assistant", "content": "d", "learn": 0},
        ],
        "weight": 0.5,
    }
    conversation = read(row)
    assert conversation.weight == 0.5
    assert [turn.learn for turn in conversation.turns] == [None, False, True, False]
    assert conversation.turns[2].weight == 2.0
    assert read({"text": "t", "weight": 3}) == Document("t", 3.0, "x.jsonl:7")


def test_a_users_function(tmp_path):
    file = tmp_path / "shapes.py"
    file.write_text(
        "def questions(row):\n"
        "    turns = [('user', row['q']), ('assistant', row['a'])]\n"
        "    return {'messages': [{'role': role, 'content': text} for role, text in turns]}\n"
        "def broken(row):\n    return row['nothing']\n"
        "def wrong(row):\n    return 3\n"
    )
    assert turns({"q": "A", "a": "B"}, f"{file}:questions") == [("user", "A"), ("assistant", "B")]
    for name, message in (
        ("broken", "x.jsonl:7: broken failed: KeyError"),
        ("wrong", "x.jsonl:7: wrong returned int"),
        ("absent", "has no function 'absent'"),
    ):
        with pytest.raises(UserError, match=message):
            read({"q": "A"}, f"{file}:{name}")
    with pytest.raises(UserError, match="no such file"):
        conversation_reader("nowhere.py:f")


def user(content="a", **more):
    return {"role": "user", "content": content, **more}


ANSWER = {"role": "assistant", "content": "b"}
BAD = {
    "unknown role": (
        {"messages": [{"role": "wizard", "content": "a"}, ANSWER]},
        "unknown role 'wizard'; the roles are",
    ),
    "no role": ({"messages": [{"content": "a"}, ANSWER]}, "unknown role None"),
    "unhashable role": ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role"),
    "no assistant": ({"messages": [user()]}, r"no assistant turn to take the loss on \(turns: user\)"),
    "empty": ({"messages": []}, "the conversation is empty"),
    "not a list": ({"messages": "hi"}, "messages is not a list"),
    "not an object": ({"messages": ["hi"]}, "a message is not an object"),
    "content missing": ({"messages": [{"role": "user"}, ANSWER]}, '"content" is missing'),
    "content number": ({"messages": [user(3), ANSWER]}, '"content" is not a text'),
    "image": ({"messages": [user([{"type": "image_url"}]), ANSWER]}, "content part of type 'image_url'"),
    "weight": ({"messages": [user(), ANSWER], "weight": -1}, '"weight" is a number of at least 0, not -1'),
    "weight NaN": ({"messages": [user(), ANSWER], "weight": float("nan")}, '"weight" is a number'),
    "learn": ({"messages": [user(learn="yes"), ANSWER]}, '"learn" is true or false'),
    "calls of a user": (
        {"messages": [user(tool_calls=[{"name": "f"}]), ANSWER]},
        "only the assistant calls tools",
    ),
    "arguments": (
        {"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": "x"}]}]},
        "a tool call is",
    ),
    "tools": ({"messages": [user(), ANSWER], "tools": [{"x": 1}]}, "a tool is"),
    "tools not JSON": ({"messages": [user(), ANSWER], "tools": "x"}, "text but not JSON"),
    "reasoning": ({"messages": [user(), {**ANSWER, "reasoning_content": "hm"}]}, "put it in the content"),
    "alpaca number": ({"instruction": "a", "output": 3}, '"output" is not a text'),
    "history": ({"instruction": "a", "output": "b", "history": ["x"]}, '"history" is a list of'),
    "sharegpt value": ({"conversations": [{"from": "human"}]}, '"value" is missing'),
    "sharegpt role": ({"conversations": [{"from": "cat", "value": "x"}]}, "unknown role 'cat'"),
    "call not JSON": ({"conversations": [{"from": "function_call", "value": "x"}]}, "not JSON"),
    "undesirable": ({"prompt": "a", "completion": "b", "label": False}, "train on such rows by KTO"),
    "empty text": ({"text": "  "}, "the text is empty"),
    "unknown shape": ({"question": "a"}, r"shape is unknown \(keys: question\); it needs messages"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_say_where_and_what(case):
    row, message = BAD[case]
    with pytest.raises(UserError, match=f"^x.jsonl:7: .*{message}"):
        read(row)


def test_later_rows_keep_the_shape_of_the_first():
    reader = conversation_reader()
    reader.read({"prompt": "A", "completion": "B"}, "x:1")
    with pytest.raises(UserError, match=r"x:2: not a prompt_completion row .*first row\)"):
        reader.read({"text": "A"}, "x:2")
    with pytest.raises(UserError, match="named in the config"):
        read({"text": "A"}, "alpaca")


def test_a_rollout_is_read_as_it_was_scored():
    """Written and read again: the prompt's turns in full and the answer, without the policy's own system prompt."""
    asked = (
        Turn("system", "Be brief."),
        Turn("user", "Add.\n1 1", input="1 1"),
        Turn("assistant", "", tool_calls=(ToolCall("add", {"a": 1}, id="c"),)),
        Turn("tool", "2", name="add", call_id="c"),
    )
    tools = ({"type": "function", "function": {"name": "add"}},)
    prompt = Prompt(asked, tools, condition="polite", reference="2", origin="p.jsonl:4")
    facts = {"number": 3, "score": 0.5, "gold": None, "ended": True}
    row = json.loads(json.dumps({"step": 1, **rollout_row(prompt, "", **facts)}))
    assert not {"policy_system", "gold"} & row.keys(), "the prompt has a system turn of its own"
    conversation = read(row)
    assert conversation == Conversation((*asked, Turn("assistant", "")), tools, origin="x.jsonl:7")
    plain = Prompt((Turn("user", "Hi"),), system="Be kind.", origin="p.jsonl:5")
    row = rollout_row(plain, "Hello", **facts | {"gold": 0.0})
    assert (row["policy_system"], row["gold"], row["prompt_number"]) == ("Be kind.", 0.0, 3)
    assert turns(row) == [("user", "Hi"), ("assistant", "Hello")]


def test_a_rollout_that_was_edited_is_refused_where_it_stands():
    row = rollout_row(Prompt((Turn("user", "Hi"),)), "Hello", number=0, score=0.0, gold=None, ended=True)
    for change, word in (
        ({"answer": 3}, '"answer"'),
        ({"prompt": "Hi"}, '"prompt"'),
        ({"prompt": [1]}, "message"),
    ):
        with pytest.raises(UserError, match=rf"x\.jsonl:7: .*{word}"):
            read(row | change)
