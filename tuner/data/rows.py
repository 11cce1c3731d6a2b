"""Row shapes to conversations and documents. One example file per shape stands in data_templates/rows."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from tuner.config.part import load_function
from tuner.data.conversation import ROLES, Conversation, Document, ToolCall, Turn
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


class Reader:
    """Rows of one source to conversations or documents.

    The shape is named by the config, recognised from the first row, or made by a user's function; every
    further row has to have it. Raises UserError with `file:line` for rows that have not.
    """

    def __init__(self, shape: str | None = None):
        self._function = None
        if shape is not None and shape not in SHAPES:
            self._function = load_function(shape, "shape", f"one of {', '.join(SHAPES)}, or ")
        self._shape = None if self._function else shape
        self._named = self._shape is not None

    def read(self, row: Values, origin: str) -> Conversation | Document:
        """One row. origin: its `file:line`."""
        if self._function is not None:
            row = _call(self._function, row, origin)
        shape = self._shape or recognise(row, origin)
        if self._function is None:
            self._shape = shape
        keys = SHAPES[shape].keys
        if not any(all(_has(row, key) for key in choice) for choice in keys):
            how = "named in the config" if self._named else "recognised from the source's first row"
            wanted = " or ".join("+".join(f'"{key}"' for key in choice) for choice in keys)
            _refuse(origin, f"not a {shape} row (the shape {how}): it needs {wanted}, it has {_names(row)}")
        result = SHAPES[shape].read(row, origin)
        if isinstance(result, Conversation):
            _check_turns(result)
        return result


def recognise(row: Values, origin: str) -> str:
    """The shape a row's keys tell; UserError when they tell none."""
    for name, shape in SHAPES.items():
        if any(all(_has(row, key) for key in choice) for choice in shape.keys):
            return name
    raise UserError(
        f"{origin}: this row's shape is unknown (keys: {_names(row)}); it needs messages, conversations, "
        "instruction+output, prompt+completion or text, or a Source(shape=function) that makes one of them"
    )


def _read_messages(row: Values, origin: str) -> Conversation:
    messages = next(row[key] for key in ("messages", "conversations", "conversation") if _has(row, key))
    return _conversation(
        row, [_turn(message, origin) for message in _list(messages, "messages", origin)], origin
    )


def _read_sharegpt(row: Values, origin: str) -> Conversation:
    """ShareGPT's from/value pairs; role/content under the same key, and XTuner's system/input/output, too."""
    messages = _list(
        next(row[key] for key in ("conversations", "conversation") if _has(row, key)), "turns", origin
    )
    first = messages[0] if messages else {}
    if isinstance(first, Mapping) and "role" in first and "from" not in first:
        return _read_messages(row, origin)
    if isinstance(first, Mapping) and "output" in first:
        return _conversation(row, [turn for item in messages for turn in _exchange(item, origin)], origin)
    turns = []
    for message in messages:
        _mapping(message, "a turn", origin)
        value = _text(message.get("value"), '"value"', origin)
        if message.get("from") == "function_call":
            calls = (
                json.loads(value) if _is_json(value) else _refuse(origin, "a function_call that is not JSON")
            )
            calls = calls if isinstance(calls, list) else [calls]
            plain = {"role": "assistant", "content": "", "tool_calls": calls}
        else:
            plain = {"role": message.get("from"), "content": value}
        turns.append(_turn({**message, **plain}, origin))
    return _conversation(row, turns, origin)


def _exchange(item: Any, origin: str) -> list[Turn]:
    """XTuner 0.x: {"system": ..., "input": ..., "output": ...} for a question and its answer."""
    _mapping(item, "a turn", origin)
    system = [Turn("system", _text(item["system"], '"system"', origin))] if item.get("system") else []
    user = [Turn("user", _text(item["input"], '"input"', origin))] if item.get("input") else []
    answer = Turn("assistant", _text(item.get("output"), '"output"', origin), **_switches(item, origin))
    return [*system, *user, answer]


def _read_alpaca(row: Values, origin: str) -> Conversation:
    turns: list[Turn] = []
    for pair in _list(row.get("history") or [], '"history"', origin):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            _refuse(origin, '"history" is a list of [question, answer] pairs')
        question, answer = (_text(part, '"history"', origin) for part in pair)
        turns += [Turn("user", question), Turn("assistant", answer)]
    instruction = _text(row["instruction"], '"instruction"', origin)
    given = _text(row.get("input") or "", '"input"', origin)
    answer = _text(next(row[key] for key in ("output", "response") if _has(row, key)), '"output"', origin)
    question = f"{instruction}\n{given}" if given else instruction
    turns += [Turn("user", question, input=given or None), Turn("assistant", answer)]
    return _conversation(row, turns, origin)


def _read_prompt_completion(row: Values, origin: str) -> Conversation:
    turns: list[Turn] = []
    answer = next(key for key in ("completion", "response") if _has(row, key))
    for key, role in (("prompt", "user"), (answer, "assistant")):
        value = row[key]
        if isinstance(value, str):
            turns.append(Turn(role, value))
        else:
            turns += [_turn(message, origin) for message in _list(value, f'"{key}"', origin)]
    return _conversation(row, turns, origin)


def _read_text(row: Values, origin: str) -> Document:
    text = _text(row["text"], '"text"', origin)
    if not text.strip():
        _refuse(origin, "the text is empty; take the row out")
    return Document(text, _weight(row, origin), origin)


class Shape:
    """How a shape is told by its keys (any of the choices), and how it is read."""

    def __init__(self, read: Callable[[Values, str], Conversation | Document], *keys: tuple[str, ...]):
        self.read = read
        self.keys = keys


SHAPES: dict[str, Shape] = {
    "messages": Shape(_read_messages, ("messages",)),
    "sharegpt": Shape(_read_sharegpt, ("conversations",), ("conversation",)),
    "alpaca": Shape(_read_alpaca, ("instruction", "output"), ("instruction", "response")),
    "prompt_completion": Shape(_read_prompt_completion, ("prompt", "completion"), ("prompt", "response")),
    "text": Shape(_read_text, ("text",)),
}
"""In the order of recognition: more telling keys first. The names are those of config.data.Shape."""


def _conversation(row: Values, turns: list[Turn], origin: str) -> Conversation:
    if row.get("system"):
        turns = [Turn("system", _text(row["system"], '"system"', origin)), *turns]
    return Conversation(tuple(turns), _tools(row, origin), _weight(row, origin), origin)


def _check_turns(conversation: Conversation) -> None:
    if not conversation.turns:
        _refuse(conversation.origin, "the conversation is empty; take the row out")
    if all(turn.role != "assistant" for turn in conversation.turns):
        roles = ", ".join(turn.role for turn in conversation.turns)
        _refuse(
            conversation.origin,
            f"no assistant turn to learn from (turns: {roles}); add one or take the row out",
        )


def _turn(message: Any, origin: str) -> Turn:
    """An OpenAI or InternLM2 message."""
    _mapping(message, "a message", origin)
    given = message.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        _refuse(origin, f"unknown role {given!r}; the roles are {', '.join(ROLES)}")
    for key in ("reasoning_content", "thinking", "reasoning"):
        if message.get(key):
            _refuse(origin, f'"{key}" is not rendered; put it in the content, as in <think>...</think>')
    name, call_id = message.get("name"), message.get("tool_call_id")
    for key, value in (("name", name), ("tool_call_id", call_id)):
        if value is not None and not isinstance(value, str):
            _refuse(origin, f'"{key}" is a text, not {value!r}')
    calls = tuple(
        _call_of(call, origin) for call in _list(message.get("tool_calls") or [], '"tool_calls"', origin)
    )
    if calls and role != "assistant":
        _refuse(origin, f'"tool_calls" in a {role} turn; only the assistant calls tools')
    content = _content(message.get("content"), bool(calls), origin)
    return Turn(role, content, name, calls, call_id=call_id, **_switches(message, origin))


def _content(content: Any, may_be_empty: bool, origin: str) -> str:
    """A message's text: a string, or a list of text parts."""
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                _refuse(origin, f"a content part of type {kind!r}; only text parts are learned here")
        return "".join(_text(part.get("text"), "a content part", origin) for part in content)
    return _text(content, '"content"', origin)


def _call_of(call: Any, origin: str) -> ToolCall:
    """OpenAI's {"id", "function": {"name", "arguments"}}; InternLM2's {"name", "parameters"} too."""
    _mapping(call, "a tool call", origin)
    function = call.get("function") or call
    _mapping(function, "a tool call's function", origin)
    arguments = next(
        (function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {}
    )
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if _is_json(arguments) else arguments
    if not isinstance(arguments, Mapping) or not isinstance(function.get("name"), str):
        _refuse(origin, 'a tool call is {"name": text, "arguments": {...}}, the arguments a JSON object')
    identity = call.get("id")
    return ToolCall(function["name"], arguments, identity if isinstance(identity, str) else None)


def _tools(row: Values, origin: str) -> tuple[Values, ...]:
    """The row's tools, each as OpenAI writes it; a list, or that list as JSON text (ShareGPT sets)."""
    tools = row.get("tools") or row.get("functions") or []
    if isinstance(tools, str):
        tools = json.loads(tools) if _is_json(tools) else _refuse(origin, '"tools" is text but not JSON')
    result = []
    for tool in _list(tools, '"tools"', origin):
        _mapping(tool, "a tool", origin)
        function = tool.get("function") or tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _refuse(origin, 'a tool is {"type": "function", "function": {"name": text, ...}}')
        result.append({"type": "function", "function": function})
    return tuple(result)


def _switches(message: Values, origin: str) -> dict[str, Any]:
    """A turn's own `learn` (also called `loss` and `train`) and `weight`."""
    learn = next((message[key] for key in ("learn", "loss", "train") if message.get(key) is not None), None)
    if learn is not None and learn not in (True, False):
        _refuse(origin, f'"learn" is true or false, not {learn!r}; a factor is called "weight"')
    return {"learn": None if learn is None else bool(learn), "weight": _weight(message, origin)}


def _weight(values: Values, origin: str) -> float:
    weight = values.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        _refuse(origin, f'"weight" is a number from 0 on, not {weight!r}')
    return float(weight)


def _call(function: Callable[[Values], Any], row: Values, origin: str) -> Values:
    try:
        result = function(row)
    except Exception as error:
        raise UserError(f"{origin}: {function.__name__} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, Mapping):
        _refuse(origin, f'{function.__name__} returned {type(result).__name__}; return {{"messages": [...]}}')
    return result


def _has(row: Values, key: str) -> bool:
    return row.get(key) is not None  # Parquet gives absent keys as null


def _names(row: Values) -> str:
    return ", ".join(str(key) for key in row) or "none"


def _text(value: Any, what: str, origin: str) -> str:
    if not isinstance(value, str):
        _refuse(origin, f"{what} is {'missing' if value is None else 'not a text'}; write a string")
    return value


def _list(value: Any, what: str, origin: str) -> list[Any]:
    if not isinstance(value, list):
        _refuse(origin, f"{what} is not a list")
    return value


def _mapping(value: Any, what: str, origin: str) -> None:
    if not isinstance(value, Mapping):
        _refuse(origin, f"{what} is not an object but {value!r:.60}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _refuse(origin: str, message: str) -> NoReturn:
    raise UserError(f"{origin}: {message}")
