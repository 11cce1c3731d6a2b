"""What rows of every kind are made of: turns, tools, weights and texts, and errors for what they should not hold."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeGuard, cast

from tuner.data.conversation import ROLES, ToolCall, Turn
from tuner.data.lost_content import LostContentError
from tuner.errors import UserError
from tuner.printable import half_character

Values = Mapping[str, Any]
"""A row, or a JSON object in one."""

DEEPEST = 100
"""Levels that lists and objects may be nested: what walks a row later would meet Python's limit at some 300."""

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
"""Roles as published sets name them -> our roles. ShareGPT's `function_call` is a tool call, read elsewhere."""
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Keys of what is no text, in rows and in messages."""
_MEDIA_TAG = re.compile(r"\A\s*<(?:image|video|audio)>|<(?:image|video|audio)>\s*\Z")
"""Where a turn's text holds the place of one, as LLaVA's rows have it; elsewhere it is markup."""


class Cell(str):
    """A cell of a CSV file, where everything is text: read as the JSON it spells where no text is wanted."""

    __slots__ = ()


def untyped(value: Any) -> Any:
    """The number, truth value, list or object that a cell spells; any other value as it is."""
    if not isinstance(value, Cell):
        return value
    text = {"True": "true", "False": "false"}.get(value, value)  # as pandas writes them
    return json.loads(text) if is_json(text) else value


def read_turn(message: Any, origin: str) -> Turn:
    """An OpenAI or InternLM2 message. Raises UserError with its origin when it is neither."""
    message = expect_mapping(message, "a message", origin)
    written_role = message.get("role")
    role = _ROLES.get(written_role) if isinstance(written_role, str) else None
    if role is None:
        refuse(origin, f"unknown role {written_role!r}; the roles are {', '.join(ROLES)}")
    # dropped without a word, the answers would be trained on without the reasoning that led to them
    for key in ("reasoning_content", "thinking", "reasoning"):
        if message.get(key):
            refuse(origin, f'"{key}" is not rendered; put it in the content, as in <think>...</think>')
    name, call_id = message.get("name"), message.get("tool_call_id")
    for key, value in (("name", name), ("tool_call_id", call_id)):
        if value is not None and not isinstance(value, str):
            refuse(origin, f'"{key}" is a text, not {value!r}')
    _refuse_media(message, "a message", origin)
    written_calls = expect_list(message.get("tool_calls") or [], '"tool_calls"', origin)
    # as OpenAI's sets had it before tool_calls
    if has(message, "function_call"):
        written_calls = [*written_calls, message["function_call"]]
    calls = tuple(_read_call(call, origin) for call in written_calls)
    if calls and role != "assistant":
        refuse(origin, f'"tool_calls" in a {role} turn; only the assistant calls tools')
    content = _content(message.get("content"), bool(calls), origin)
    return Turn(role, content, name, calls, call_id=call_id, **read_switches(message, origin))


def message_of(turn: Turn) -> dict[str, Any]:
    """A turn as the message that templates expect and `read_turn` reads.

    Keys without a value are absent: templates test for presence.
    """
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.name is not None:
        message["name"] = turn.name
    if turn.tool_calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            | ({"id": call.id} if call.id is not None else {})
            for call in turn.tool_calls
        ]
    if turn.call_id is not None:
        message["tool_call_id"] = turn.call_id
    if turn.input is not None:
        message["input"] = turn.input
    return message


def refuse_media(row: Values, turns: Sequence[Turn], origin: str) -> None:
    """Raise LostContentError for a row that belongs to a picture, a video or a sound."""
    _refuse_media(row, "the row", origin)
    for index, turn in enumerate(turns):
        if turn.role == "user" and (tag := _MEDIA_TAG.search(turn.content)):
            raise LostContentError(
                f"{origin}: turn {index + 1} (user) holds the place of an image, video or audio ({tag[0].strip()}), "
                "and only texts are trained on; take the row out",
                "images",
            )


def _refuse_media(values: Values, where: str, origin: str) -> None:
    if key := next((key for key in _MEDIA if not _is_empty(values.get(key))), None):
        raise LostContentError(
            f'{origin}: {where} has "{key}", and only texts are trained on; take the row out', "images"
        )


def _is_empty(value: Any) -> bool:
    # the truth of a decoded picture or array is undefined
    return value is None or (isinstance(value, str | bytes | list | dict) and not value)


def _content(content: Any, may_be_empty: bool, origin: str) -> str:
    """A message's text: a string, or a list of text parts."""
    # OpenAI writes null beside tool calls
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list):
        texts: list[str] = []
        for part in cast("list[Any]", content):
            part_type = part.get("type") if is_object(part) else type(part).__name__
            if not is_object(part) or part_type != "text":
                raise LostContentError(
                    f"{origin}: a content part of type {part_type!r}; only text parts can be trained on",
                    "images",
                )
            texts.append(expect_text(part.get("text"), "a content part", origin))
        return "".join(texts)
    return expect_text(content, '"content"', origin)


def _read_call(call: Any, origin: str) -> ToolCall:
    """OpenAI's {"id", "function": {"name", "arguments"}}; InternLM2's {"name", "parameters"} too."""
    call = expect_mapping(call, "a tool call", origin)
    function = expect_mapping(call.get("function") or call, "a tool call's function", origin)
    key = next((key for key in ("arguments", "parameters") if function.get(key) is not None), None)
    arguments: Any = {} if key is None else function[key]
    # OpenAI writes arguments as JSON text, which a template's tojson would quote a second time
    if isinstance(arguments, str) and is_json(arguments):
        arguments = json.loads(arguments)
    if not is_object(arguments) or not isinstance(function.get("name"), str):
        refuse(origin, 'a tool call is {"name": text, "arguments": {...}}, the arguments a JSON object')
    identity, arguments = call.get("id"), json_values(arguments, "a tool call", origin)
    return ToolCall(function["name"], arguments, identity if isinstance(identity, str) else None)


def read_tools(row: Values, origin: str) -> tuple[Values, ...]:
    """The row's tools, each as OpenAI writes it; a list, or that list as JSON text (ShareGPT sets)."""
    tools: Any = row.get("tools") or row.get("functions") or []
    if isinstance(tools, str):
        tools = json.loads(tools) if is_json(tools) else refuse(origin, '"tools" is text but not JSON')
    result: list[Values] = []
    for tool in expect_list(tools, '"tools"', origin):
        tool = expect_mapping(tool, "a tool", origin)
        function = tool.get("function") or tool
        if not is_object(function) or not isinstance(function.get("name"), str):
            refuse(origin, 'a tool is {"type": "function", "function": {"name": text, ...}}')
        result.append({"type": "function", "function": json_values(function, "a tool", origin)})
    return tuple(result)


def read_switches(message: Values, origin: str) -> dict[str, Any]:
    """A turn's `learn` (also called `loss` or `train`) and `weight`, as arguments of Turn."""
    learn = next((message[key] for key in ("learn", "loss", "train") if message.get(key) is not None), None)
    if learn is not None and learn not in (True, False):
        refuse(origin, f'"learn" is true or false, not {learn!r}; write a factor as "weight"')
    return {"learn": None if learn is None else bool(learn), "weight": read_weight(message, origin)}


def read_weight(values: Values, origin: str) -> float:
    """The `weight` of a row or turn, 1 where it has none."""
    weight = untyped(values.get("weight"))
    if weight is None:
        return 1.0
    # in Python True is an int, and would be read as a weight of 1
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        refuse(origin, f'"weight" is a number of at least 0, not {weight!r}')
    if weight and not 1e-30 <= weight <= 1e30:
        refuse(origin, f'"weight" {weight!r:.20} is out of the range of fp32; write a moderate number')
    return float(weight)


def read_question(row: Values, origin: str) -> tuple[Turn, ...]:
    """Alpaca's prompt: `history`, `instruction`, `input`."""
    turns: list[Turn] = []
    for pair in expect_list(row.get("history") or [], '"history"', origin):
        texts = cast("Sequence[Any]", pair) if isinstance(pair, list | tuple) else ()
        if len(texts) != 2:
            refuse(origin, '"history" is a list of [question, answer] pairs')
        question, answer = (expect_text(text, '"history"', origin) for text in texts)
        turns += [Turn("user", question), Turn("assistant", answer)]
    instruction = expect_text(row["instruction"], '"instruction"', origin)
    context = expect_text(row.get("input") or "", '"input"', origin)
    question = f"{instruction}\n{context}" if context else instruction
    return (*turns, Turn("user", question, input=context or None))


def call_function(function: Callable[[Values], Any], row: Values, origin: str) -> Values:
    """The row that a user's function makes of a row. Raises UserError with the origin when it fails or returns none."""
    try:
        result = function(row)
    except Exception as error:
        raise UserError(f"{origin}: {function.__name__} failed: {type(error).__name__}: {error}") from error
    if not is_object(result):
        refuse(
            origin,
            f"{function.__name__} returned {type(result).__name__}; return a row (a dict) of one of the shapes",
        )
    return result


def has(row: Values, key: str) -> bool:
    """Whether a row has a key with a value other than null."""
    return row.get(key) is not None  # Parquet gives absent keys as null


def key_names(row: Values) -> str:
    """A row's keys that have a value, for messages."""
    return ", ".join(str(key) for key in row if has(row, key)) or "none"


def is_object(value: object) -> TypeGuard[Values]:
    """Whether a value is a JSON object (its keys are texts)."""
    return isinstance(value, Mapping)


def expect_text(value: object, name: str, origin: str) -> str:
    """The value, if it is a text; UserError otherwise. name: of the value, for the message."""
    if not isinstance(value, str):
        refuse(origin, f"{name} is {'missing' if value is None else 'not a text'}; write a string")
    if (half := half_character(value)) is not None:  # tokenizers fail on it
        refuse(origin, f"{name} has '{half}', half of a character; write its pair or take it out")
    return str(value)  # not a cell any more


def expect_list(value: object, name: str, origin: str) -> list[Any]:
    """The value, if it is a list; UserError otherwise."""
    value = untyped(value)
    if not isinstance(value, list):
        refuse(origin, f"{name} is not a list; write one")
    return cast("list[Any]", value)


def expect_mapping(value: object, name: str, origin: str) -> Values:
    """The value, if it is a JSON object; UserError otherwise."""
    if not is_object(value):
        refuse(origin, f"{name} is not an object but {value!r:.60}; write {{...}}")
    return value


def json_values(values: Values, name: str, origin: str) -> Values:
    """The object, in which values that JSON does not have (Parquet's dates, decimals and bytes) are texts.

    Templates write it as JSON. UserError for bytes that are no text. name: of the object, for the message.
    """

    def text_of(value: Any) -> Any:
        if isinstance(value, Mapping):
            return dict(cast("Values", value))
        if not isinstance(value, bytes):
            return str(value)
        try:
            return value.decode()
        except UnicodeDecodeError:
            refuse(origin, f"{name} has bytes that are no text ({value!r:.60}); write a text")

    try:
        json.dumps(values)
    except TypeError:
        return json.loads(json.dumps(values, default=text_of))
    return values


def is_json(text: str) -> bool:
    """Whether a text can be parsed as JSON that is good as data: not nested too deeply, no half of a surrogate pair."""
    try:
        value = json.loads(text)
        has_half = "\\ud" in text.lower() and half_character(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError):
        return False
    return not has_half and not is_nested_too_deeply(value)


def is_nested_too_deeply(value: object) -> bool:
    """Whether lists and objects are nested in more than DEEPEST levels."""
    layer = [value]
    for _ in range(DEEPEST):
        lists = [cast("list[object]", part) for part in layer if isinstance(part, list)]
        objects = [cast("dict[str, object]", part) for part in layer if isinstance(part, dict)]
        layer = [item for part in lists for item in part] + [
            item for part in objects for item in part.values()
        ]
    return any(isinstance(part, list | dict) for part in layer)


def refuse(origin: str, message: str) -> NoReturn:
    """Raise UserError for the row at `origin`."""
    raise UserError(f"{origin}: {message}")
