"""Calls are read as templates write them, whole or piece by piece; what is no call stays text."""

from __future__ import annotations

import json
import random

import pytest

from tests.unit.data.test_template import TOOL
from tuner.data.conversation import Conversation, ToolCall, Turn
from tuner.data.template import Template, names
from tuner.data.tool_calls import (
    HERMES,
    INTERNLM2,
    LLAMA3,
    MISTRAL,
    AnswerReader,
    ToolFormat,
    as_trained,
    call_beginning,
    longest_beginning,
    read_answer,
    tool_format_of,
)

FORMATS = {"qwen": HERMES, "internlm2": INTERNLM2, "mistral": MISTRAL, "llama3": LLAMA3}
ARGUMENTS = (
    {},
    {"city": "上海", "days": 3, "exact": True, "note": None},
    {"text": 'a "quoted" {brace}, </tool_call, ; [1]\n\\ end', "list": [{"x": [1.5, -2]}, "é"]},
)


def in_pieces(text: str, tool_format: ToolFormat | None, cut: random.Random) -> list[str | ToolCall]:
    """What a reader says of a text that is cut at random."""
    reader, parts, start = AnswerReader(tool_format), [], 0
    while start < len(text):
        end = start + cut.choice((1, 1, 2, 3, 9))
        parts += reader.push(text[start:end])
        start = end
    return [*parts, *reader.finish()]


def joined(parts: list[str | ToolCall]) -> tuple[str, tuple[ToolCall, ...]]:
    return (
        "".join(part for part in parts if isinstance(part, str)),
        tuple(part for part in parts if isinstance(part, ToolCall)),
    )


def rendered(template: Template, turn: Turn) -> str:
    """An answer as the template writes it, without its end token."""
    text = template.render(Conversation((Turn("user", "a"), turn), tools=(TOOL,)))
    begin, end = text.learned[1]
    plain = template.render(Conversation((Turn("user", "a"), Turn("assistant", "b"))))
    ending = plain.text[slice(*plain.learned[1])].rpartition("b")[2]
    return text.text[begin:end].removesuffix(ending)


@pytest.mark.parametrize("name", names())
def test_the_format_is_that_of_a_call_that_the_template_renders(name, tokenizer):
    assert tool_format_of(Template(name, tokenizer)) is FORMATS.get(name)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_template_writes_is_read_back(name, tokenizer):
    template, cut = Template(name, tokenizer), random.Random(0)
    for number, arguments in enumerate(ARGUMENTS):
        calls = (ToolCall("weather", arguments, "abcdefghi"), ToolCall("f_2", {"n": number}, "abcdefgh2"))
        for turn in (
            Turn("assistant", "", tool_calls=calls[:1]),
            Turn("assistant", "", tool_calls=calls),
            Turn("assistant", "I will look.\n", tool_calls=calls),
        ):
            if name == "llama3" and (len(turn.tool_calls) > 1 or turn.content):
                continue
            if name == "mistral" and turn.content:
                continue
            text = rendered(template, turn)
            read = read_answer(text, FORMATS[name])
            assert read[0] == turn.content
            told = [(call.name, dict(call.arguments)) for call in read[1]]
            assert told == [(call.name, dict(call.arguments)) for call in turn.tool_calls]
            assert [call.id for call in read[1]] == (
                [call.id for call in turn.tool_calls] if name == "mistral" else [None] * len(told)
            )
            for _ in range(5):
                assert joined(in_pieces(text, FORMATS[name], cut)) == read
            assert rendered(template, Turn("assistant", read[0], tool_calls=with_ids(read[1]))) == text


def with_ids(calls: tuple[ToolCall, ...]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(call.name, call.arguments, call.id or "abcdefghi") for call in calls)


NO_CALLS = {
    HERMES: (
        '<tool_call>\n{"name": "f", "arguments": {"x"',
        '<tool_call>\n{"name": "f", "arguments": {}}',
        "see\n<tool_call>no JSON</tool_call> and more",
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>\n',
        f'<tool_call>{{"name": "f", "arguments": {"[" * 500}{"]" * 500}}}</tool_call>',
        "a\n<tool_cal",
        "a < b\n\n",
    ),
    INTERNLM2: (
        '<|action_start|><|plugin|>\n{"name": "f", "parameters": 1}<|action_end|>',
        "<|action_start|><|interpreter|>\n```python\nprint(",
        "<|action_start|> alone, <|action_end|>",
    ),
    MISTRAL: ("[TOOL_CALLS] []", '[TOOL_CALLS] [{"name": "f"}]', "[TOOL_CALLS", "[TOOL_CALLS] {}"),
    LLAMA3: (
        '{"name": "f", "parameters": {}',
        '{"a": 1}',
        " { not JSON",
        'Answer: {"name": "f", "parameters": {}}',
        '{"name": "f", "parameters": {}} and more',
        "<|python_tag|>print(1)",
        "  \n",
    ),
}


@pytest.mark.parametrize("tool_format", NO_CALLS, ids=lambda each: each.vllm_parser)
def test_what_is_no_call_is_not_lost(tool_format):
    cut = random.Random(1)
    for text in NO_CALLS[tool_format]:
        assert read_answer(text, tool_format) == (text, ())
        for _ in range(10):
            assert joined(in_pieces(text, tool_format, cut)) == (text, ())


def test_a_good_call_behind_a_bad_one_is_read():
    text = 'x\n<tool_call>{"n</tool_call>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call> end'
    content, (call,) = read_answer(text, HERMES)
    assert (content, call.name) == ('x\n<tool_call>{"n</tool_call> end', "f")


def test_llama_may_call_several_and_behind_its_tag():
    one, two = ('{"name": "f", "parameters": {"x": 1}}', '{"name": "g", "parameters": {}}')
    for text in (f"{one}; {two}", f"<|python_tag|>{one};{two}", f"\n{one};\n{two}\n"):
        assert [call.name for call in read_answer(text, LLAMA3)[1]] == ["f", "g"]


def test_text_is_not_held_back_longer_than_needed():
    reader = AnswerReader(HERMES)
    assert reader.push("It is 22 <b") == ["It is 22 <b"]
    assert reader.push("\n<tool") == []
    assert reader.push("s>\n") == ["\n<tools>"]
    llama = AnswerReader(LLAMA3)
    assert llama.push("It is") == ["It is"]
    assert llama.push(' {"name"') == [' {"name"'], "braces within a text are text"


def test_the_interpreter_is_called_and_answered_as_in_training():
    code = "import math\n\nprint(math.pi)"
    text = f"Let me see.<|action_start|><|interpreter|>\n```python\n{code}\n```<|action_end|>"
    content, (call,) = read_answer(text, INTERNLM2)
    assert (content, call.name, call.arguments) == ("Let me see.", "interpreter", {"code": code})
    called = Turn("assistant", content, tool_calls=(ToolCall(call.name, call.arguments, "id1"),))
    turns = (called, Turn("tool", "3.14", call_id="id1"), Turn("tool", "22", call_id="other"))
    assert as_trained(turns, INTERNLM2) == [
        Turn("assistant", text),
        Turn("environment", "3.14", name="<|interpreter|>"),
        turns[2],
    ]
    assert as_trained(turns, HERMES) == list(turns)


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_can_be_begun_for_the_model(name, tokenizer):
    template = Template(name, tokenizer)
    begun = call_beginning(template, "weather")
    turn = Turn("assistant", "", tool_calls=(ToolCall("weather", {"city": "x"}, "abcdefghi"),))
    assert begun is not None
    assert rendered(template, turn).startswith(begun + '"')
    assert begun.removesuffix("weather") == call_beginning(template, None)
    assert call_beginning(Template("chatml", tokenizer), None) is None


def test_what_may_begin_a_word_is_found_at_the_end():
    assert longest_beginning("ab<to", ("<tool>", "<|x")) == 3
    assert longest_beginning("ab<", ("<tool>",)) == 1
    assert longest_beginning("<tool>", ("<tool>",)) == 0, "a whole word is no beginning"
    assert longest_beginning("ab", ()) == longest_beginning("", ("a",)) == 0


def test_arguments_stay_as_they_are():
    text = '<tool_call>{"name": "f", "arguments": {"a": 1, "b": "ü"}}</tool_call>'
    (call,) = read_answer(text, HERMES)[1]
    assert json.dumps(call.arguments, ensure_ascii=False) == '{"a": 1, "b": "ü"}'
