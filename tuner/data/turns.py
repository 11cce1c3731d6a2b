"""What rows of every kind are made of: turns as OpenAI and InternLM2 write them, and words for what is not."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from tuner.data.conversation import ROLES, ToolCall, Turn
from tuner.errors import UserError

Values = Mapping[str, Any]

_ROLES = {role: role for role in ROLES} | {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""What the shapes in use call the roles, and what they are here. `function_call` is read apart."""


def read_turn(message: Any, origin: str) -> Turn:
    """An OpenAI or InternLM2 message."""
    expect_mapping(message, "a message", origin)
    given = message.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        refuse(origin, f"unknown role {given!r}; the roles are {', '.join(ROLES)}")
    for key in ("reasoning_content", "thinking", "reasoning"):
        if message.get(key):
            refuse(origin, f'"{key}" is not rendered; put it in the content, as in <think>...</think>')
    name, call_id = message.get("name"), message.get("tool_call_id")
    for key, value in (("name", name), ("tool_call_id", call_id)):
        if value is not None and not isinstance(value, str):
            refuse(origin, f'"{key}" is a text, not {value!r}')
    calls = tuple(
        _call_of(call, origin)
        for call in expect_list(message.get("tool_calls") or [], '"tool_calls"', origin)
    )
    if calls and role != "assistant":
        refuse(origin, f'"tool_calls" in a {role} turn; only the assistant calls tools')
    content = _content(message.get("content"), bool(calls), origin)
    return Turn(role, content, name, calls, call_id=call_id, **read_switches(message, origin))


def _content(content: Any, may_be_empty: bool, origin: str) -> str:
    """A message's text: a string, or a list of text parts."""
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                refuse(origin, f"a content part of type {kind!r}; only text parts are learned here")
        return "".join(expect_text(part.get("text"), "a content part", origin) for part in content)
    return expect_text(content, '"content"', origin)


def _call_of(call: Any, origin: str) -> ToolCall:
    """OpenAI's {"id", "function": {"name", "arguments"}}; InternLM2's {"name", "parameters"} too."""
    expect_mapping(call, "a tool call", origin)
    function = call.get("function") or call
    expect_mapping(function, "a tool call's function", origin)
    arguments = next(
        (function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {}
    )
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if is_json(arguments) else arguments
    if not isinstance(arguments, Mapping) or not isinstance(function.get("name"), str):
        refuse(origin, 'a tool call is {"name": text, "arguments": {...}}, the arguments a JSON object')
    identity = call.get("id")
    return ToolCall(function["name"], arguments, identity if isinstance(identity, str) else None)


def read_tools(row: Values, origin: str) -> tuple[Values, ...]:
    """The row's tools, each as OpenAI writes it; a list, or that list as JSON text (ShareGPT sets)."""
    tools = row.get("tools") or row.get("functions") or []
    if isinstance(tools, str):
        tools = json.loads(tools) if is_json(tools) else refuse(origin, '"tools" is text but not JSON')
    result = []
    for tool in expect_list(tools, '"tools"', origin):
        expect_mapping(tool, "a tool", origin)
        function = tool.get("function") or tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            refuse(origin, 'a tool is {"type": "function", "function": {"name": text, ...}}')
        result.append({"type": "function", "function": function})
    return tuple(result)


def read_switches(message: Values, origin: str) -> dict[str, Any]:
    """A turn's own `learn` (also called `loss` and `train`) and `weight`."""
    learn = next((message[key] for key in ("learn", "loss", "train") if message.get(key) is not None), None)
    if learn is not None and learn not in (True, False):
        refuse(origin, f'"learn" is true or false, not {learn!r}; a factor is called "weight"')
    return {"learn": None if learn is None else bool(learn), "weight": read_weight(message, origin)}


def read_weight(values: Values, origin: str) -> float:
    weight = values.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        refuse(origin, f'"weight" is a number from 0 on, not {weight!r}')
    if weight and not 1e-30 <= weight <= 1e30:
        refuse(origin, f'"weight" {weight!r:.20} is beyond what fp32 holds well; write a moderate number')
    return float(weight)


def read_question(row: Values, origin: str) -> tuple[Turn, ...]:
    """Alpaca's question: `history`, `instruction`, `input`."""
    turns: list[Turn] = []
    for pair in expect_list(row.get("history") or [], '"history"', origin):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            refuse(origin, '"history" is a list of [question, answer] pairs')
        question, answer = (expect_text(part, '"history"', origin) for part in pair)
        turns += [Turn("user", question), Turn("assistant", answer)]
    instruction = expect_text(row["instruction"], '"instruction"', origin)
    given = expect_text(row.get("input") or "", '"input"', origin)
    question = f"{instruction}\n{given}" if given else instruction
    return (*turns, Turn("user", question, input=given or None))


def call_function(function: Callable[[Values], Any], row: Values, origin: str) -> Values:
    try:
        result = function(row)
    except Exception as error:
        raise UserError(f"{origin}: {function.__name__} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, Mapping):
        refuse(
            origin,
            f"{function.__name__} returned {type(result).__name__}; return a row (a dict) of one of the shapes",
        )
    return result


def has(row: Values, key: str) -> bool:
    return row.get(key) is not None  # Parquet gives absent keys as null


def names_of(row: Values) -> str:
    return ", ".join(str(key) for key in row) or "none"


def expect_text(value: Any, what: str, origin: str) -> str:
    if not isinstance(value, str):
        refuse(origin, f"{what} is {'missing' if value is None else 'not a text'}; write a string")
    return value


def expect_list(value: Any, what: str, origin: str) -> list[Any]:
    if not isinstance(value, list):
        refuse(origin, f"{what} is not a list")
    return value


def expect_mapping(value: Any, what: str, origin: str) -> None:
    if not isinstance(value, Mapping):
        refuse(origin, f"{what} is not an object but {value!r:.60}")


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def refuse(origin: str, message: str) -> NoReturn:
    raise UserError(f"{origin}: {message}")
