"""Row shapes to conversations and documents. One example file per shape stands in data_templates/rows."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from tuner.config.functions import load_function
from tuner.data.conversation import Conversation, Document, Turn
from tuner.data.turns import (
    Values,
    call_function,
    expect_list,
    expect_mapping,
    expect_text,
    has,
    is_json,
    names_of,
    read_question,
    read_switches,
    read_tools,
    read_turn,
    read_weight,
    refuse,
)
from tuner.errors import UserError


class Shape:
    """How a shape is told by its keys (any of the choices), and how it is read."""

    def __init__(self, read: Callable[[Values, str], Any], *keys: tuple[str, ...]):
        self.read = read
        self.keys = keys


class Reader:
    """Rows of one source to conversations and documents, or to what other `shapes` make of them.

    The shape is named by the config, recognised from the first row, or made by a user's function; every
    further row has to have it. Raises UserError with `file:line` for rows that have not.
    """

    def __init__(self, shape: str | None = None, shapes: Mapping[str, Shape] | None = None):
        self._shapes = SHAPES if shapes is None else shapes
        self._function = None
        if shape is not None and shape not in self._shapes:
            self._function = load_function(shape, "shape", f"one of {', '.join(self._shapes)}, or ")
        self._shape = None if self._function else shape
        self._named = self._shape is not None

    def read(self, row: Values, origin: str) -> Any:
        """One row. origin: its `file:line`."""
        if self._function is not None:
            row = call_function(self._function, row, origin)
        name = self._shape or recognise(row, origin, self._shapes)
        if self._function is None:
            self._shape = name
        shape = self._shapes[name]
        if not any(all(has(row, key) for key in choice) for choice in shape.keys):
            how = "named in the config" if self._named else "recognised from the source's first row"
            wanted = " or ".join("+".join(f'"{key}"' for key in choice) for choice in shape.keys)
            refuse(origin, f"not a {name} row (the shape {how}): it needs {wanted}, it has {names_of(row)}")
        return shape.read(row, origin)


def recognise(row: Values, origin: str, shapes: Mapping[str, Shape] | None = None) -> str:
    """The shape a row's keys tell; UserError when they tell none."""
    shapes = SHAPES if shapes is None else shapes
    for name, shape in shapes.items():
        if any(all(has(row, key) for key in choice) for choice in shape.keys):
            return name
    *others, last = ["+".join(shape.keys[0]) for shape in shapes.values()]
    raise UserError(
        f"{origin}: this row's shape is unknown (keys: {names_of(row)}); it needs {', '.join(others)} or {last}, "
        "or a Source(shape=function) that makes one of them"
    )


def read_messages(row: Values, origin: str) -> Conversation:
    messages = next(row[key] for key in ("messages", "conversations", "conversation") if has(row, key))
    return _conversation(
        row, [read_turn(message, origin) for message in expect_list(messages, "messages", origin)], origin
    )


def read_sharegpt(row: Values, origin: str) -> Conversation:
    """ShareGPT's from/value pairs; role/content under the same key, and XTuner's system/input/output, too."""
    messages = expect_list(
        next(row[key] for key in ("conversations", "conversation") if has(row, key)), "turns", origin
    )
    first = messages[0] if messages else {}
    if isinstance(first, Mapping) and "role" in first and "from" not in first:
        return read_messages(row, origin)
    if isinstance(first, Mapping) and "output" in first:
        return _conversation(row, [turn for item in messages for turn in _exchange(item, origin)], origin)
    turns = []
    for message in messages:
        expect_mapping(message, "a turn", origin)
        value = expect_text(message.get("value"), '"value"', origin)
        if message.get("from") == "function_call":
            calls = (
                json.loads(value) if is_json(value) else refuse(origin, "a function_call that is not JSON")
            )
            calls = calls if isinstance(calls, list) else [calls]
            plain = {"role": "assistant", "content": "", "tool_calls": calls}
        else:
            plain = {"role": message.get("from"), "content": value}
        turns.append(read_turn({**message, **plain}, origin))
    return _conversation(row, turns, origin)


def _exchange(item: Any, origin: str) -> list[Turn]:
    """XTuner 0.x: {"system": ..., "input": ..., "output": ...} for a question and its answer."""
    expect_mapping(item, "a turn", origin)
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


def _answered(read: Callable[[Values, str], Conversation]) -> Callable[[Values, str], Conversation]:
    """A reader that refuses conversations without a turn to learn from."""

    def read_and_check(row: Values, origin: str) -> Conversation:
        conversation = read(row, origin)
        _check_turns(conversation)
        return conversation

    return read_and_check


SHAPES: dict[str, Shape] = {
    "messages": Shape(_answered(read_messages), ("messages",)),
    "sharegpt": Shape(_answered(read_sharegpt), ("conversations",), ("conversation",)),
    "alpaca": Shape(_answered(_read_alpaca), ("instruction", "output"), ("instruction", "response")),
    "prompt_completion": Shape(
        _answered(_read_prompt_completion), ("prompt", "completion"), ("prompt", "response")
    ),
    "text": Shape(_read_text, ("text",)),
}
"""In the order of recognition: more telling keys first. The names are those of config.data.Shape."""


def _conversation(row: Values, turns: list[Turn], origin: str) -> Conversation:
    if row.get("system"):
        turns = [Turn("system", expect_text(row["system"], '"system"', origin)), *turns]
    return Conversation(tuple(turns), read_tools(row, origin), read_weight(row, origin), origin)


def _check_turns(conversation: Conversation) -> None:
    if not conversation.turns:
        refuse(conversation.origin, "the conversation is empty; take the row out")
    if all(turn.role != "assistant" for turn in conversation.turns):
        roles = ", ".join(turn.role for turn in conversation.turns)
        refuse(
            conversation.origin,
            f"no assistant turn to learn from (turns: {roles}); add one or take the row out",
        )
