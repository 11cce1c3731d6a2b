"""Row shapes that are read as conversations and documents; data_templates/rows has an example file of each."""

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from tuner.data.conversation import Conversation, Document, Turn
from tuner.data.rollout_rows import KEYS, read_rollout
from tuner.data.row_shapes import Reader, Shape, registered_shapes
from tuner.data.turns import (
    Values,
    expect_list,
    expect_mapping,
    expect_text,
    has,
    is_json,
    read_question,
    read_switches,
    read_tools,
    read_turn,
    read_weight,
    refuse,
    refuse_media,
)


def conversation_reader(shape: str | None = None) -> Reader:
    """A reader of conversations and documents; see Reader."""
    return Reader(shape, {**registered_shapes("conversation"), **SHAPES})


def read_messages(row: Values, origin: str) -> Conversation:
    """OpenAI's and InternLM2's lists of role/content messages."""
    messages = next(row[key] for key in ("messages", "conversations", "conversation") if has(row, key))
    return _conversation(
        row, [read_turn(message, origin) for message in expect_list(messages, "messages", origin)], origin
    )


def read_sharegpt(row: Values, origin: str) -> Conversation:
    """ShareGPT's from/value turns; also role/content messages and XTuner's system/input/output under the same key."""
    messages = expect_list(
        next(row[key] for key in ("conversations", "conversation") if has(row, key)), "turns", origin
    )
    first: Any = messages[0] if messages else {}
    if isinstance(first, Mapping) and "role" in first and "from" not in first:
        return read_messages(row, origin)
    if isinstance(first, Mapping) and "output" in first:
        return _conversation(row, [turn for item in messages for turn in _exchange(item, origin)], origin)
    return _conversation(row, [_sharegpt_turn(message, origin) for message in messages], origin)


def _sharegpt_turn(message: Any, origin: str) -> Turn:
    message = expect_mapping(message, "a turn", origin)
    value = expect_text(message.get("value"), '"value"', origin)
    if message.get("from") != "function_call":
        return read_turn({**message, "role": message.get("from"), "content": value}, origin)
    calls: Any = json.loads(value) if is_json(value) else refuse(origin, "a function_call that is not JSON")
    calls = cast("list[Any]", calls) if isinstance(calls, list) else [calls]
    return read_turn({**message, "role": "assistant", "content": "", "tool_calls": calls}, origin)


def _exchange(item: Any, origin: str) -> list[Turn]:
    """XTuner 0.x: {"system": ..., "input": ..., "output": ...} for a question and its answer."""
    item = expect_mapping(item, "a turn", origin)
    system = [Turn("system", expect_text(item["system"], '"system"', origin))] if item.get("system") else []
    user = [Turn("user", expect_text(item["input"], '"input"', origin))] if item.get("input") else []
    answer = Turn(
        "assistant", expect_text(item.get("output"), '"output"', origin), **read_switches(item, origin)
    )
    return [*system, *user, answer]


def _read_alpaca(row: Values, origin: str) -> Conversation:
    answer = expect_text(
        next(row[key] for key in ("output", "response") if has(row, key)), '"output"', origin
    )
    return _conversation(row, [*read_question(row, origin), Turn("assistant", answer)], origin)


def _read_prompt_completion(row: Values, origin: str) -> Conversation:
    turns: list[Turn] = []
    answer = next(key for key in ("completion", "response") if has(row, key))
    for key, role in (("prompt", "user"), (answer, "assistant")):
        value = row[key]
        if isinstance(value, str):
            turns.append(Turn(role, value))
        else:
            turns += [read_turn(message, origin) for message in expect_list(value, f'"{key}"', origin)]
    return _conversation(row, turns, origin)


def _read_text(row: Values, origin: str) -> Document:
    text = expect_text(row["text"], '"text"', origin)
    if not text.strip():
        refuse(origin, "the text is empty; take the row out")
    return Document(text, read_weight(row, origin), origin)


def _checked(read: Callable[[Values, str], Conversation]) -> Callable[[Values, str], Conversation]:
    """A reader that raises UserError for conversations without an assistant turn."""

    def read_and_check(row: Values, origin: str) -> Conversation:
        conversation = read(row, origin)
        _check_turns(conversation)
        return conversation

    return read_and_check


SHAPES: dict[str, Shape] = {
    "messages": Shape(_checked(read_messages), ("messages",)),
    "sharegpt": Shape(_checked(read_sharegpt), ("conversations",), ("conversation",)),
    "alpaca": Shape(_checked(_read_alpaca), ("instruction", "output"), ("instruction", "response")),
    "prompt_completion": Shape(
        _checked(_read_prompt_completion), ("prompt", "completion"), ("prompt", "response")
    ),
    "rollout": Shape(read_rollout, KEYS),
    "text": Shape(_read_text, ("text",)),
}
"""In the order of recognition: the more specific keys first."""


def _conversation(row: Values, turns: list[Turn], origin: str) -> Conversation:
    if row.get("system"):
        turns = [Turn("system", expect_text(row["system"], '"system"', origin)), *turns]
    refuse_media(row, turns, origin)
    if row.get("label") is False:
        refuse(
            origin,
            '"label" is false: the answer is undesirable; train on such rows by KTO, or take the row out',
        )
    return Conversation(tuple(turns), read_tools(row, origin), read_weight(row, origin), origin)


def _check_turns(conversation: Conversation) -> None:
    if not conversation.turns:
        refuse(conversation.origin, "the conversation is empty; take the row out")
    if all(turn.role != "assistant" for turn in conversation.turns):
        roles = ", ".join(turn.role for turn in conversation.turns)
        refuse(
            conversation.origin,
            f"no assistant turn to take the loss on (turns: {roles}); add one or take the row out",
        )
