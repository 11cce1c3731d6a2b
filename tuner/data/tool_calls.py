"""Tool calls in the text of an answer: read as the model's template writes them, from text that comes in pieces."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from tuner.data.conversation import Conversation, ToolCall, Turn
from tuner.data.template import Template
from tuner.data.turns import is_json, is_object
from tuner.errors import UserError

INTERPRETER = "interpreter"
"""The name of a call of InternLM2's code interpreter; its one argument is `code`."""
_INTERPRETER_BEGIN, _ACTION_END = "<|action_start|><|interpreter|>", "<|action_end|>"
_INTERPRETER_ROLE = "<|interpreter|>"
_CODE = re.compile(r"\s*```(?:python|py)?\n(.*?)\n?```\s*", re.S)
_ID = string.ascii_letters + string.digits
_PROBE = ToolCall("lookup", {"key": "seven", "number": 7}, id="a1b2c3d4e")
_THOUGHT = "<think>\nt\n</think>\n\n"
_JSON = json.JSONDecoder()

BodyReader = Callable[[str], list[ToolCall]]
"""Reads what stands behind an opening; raises ValueError where that is no call."""


def _call(value: Any, arguments: str) -> ToolCall:
    if not (is_object(value) and isinstance(value.get("name"), str) and is_object(value.get(arguments))):
        raise ValueError("no call")
    identity = value.get("id")
    return ToolCall(value["name"], value[arguments], identity if isinstance(identity, str) else None)


def _json(text: str) -> Any:
    if not is_json(text):
        raise ValueError("no JSON")
    return json.loads(text)


def _read_hermes(body: str) -> list[ToolCall]:
    return [_call(_json(body), "arguments")]


def _read_plugin(body: str) -> list[ToolCall]:
    return [_call(_json(body), "parameters")]


def _read_code(body: str) -> list[ToolCall]:
    code = _CODE.fullmatch(body)
    return [ToolCall(INTERPRETER, {"code": body.strip() if code is None else code[1]})]


def _read_mistral(body: str) -> list[ToolCall]:
    values = _json(body)
    if not isinstance(values, list):
        raise ValueError("no list of calls")
    return [_call(value, "arguments") for value in cast("list[Any]", values)]


def _read_llama(body: str) -> list[ToolCall]:
    """Objects with a semicolon between them."""
    calls: list[ToolCall] = []
    text = body.strip()
    while text:
        _, end = _JSON.raw_decode(text)
        calls.append(_call(_json(text[:end]), "parameters"))
        text = text[end:].strip().removeprefix(";").strip()
    return calls


@dataclass(frozen=True, eq=False)
class ToolFormat:
    """How a family writes calls: what opens one, how its body is read, and what closes it."""

    openings: Mapping[str, BodyReader]
    closing: str | None
    """None: the end of the answer."""
    vllm_parser: str
    """The name of vLLM's parser of this format."""
    separator: str = ""
    """What the template writes between an answer's text, or another call, and a call."""
    only_at_start: bool = False
    """Whether an opening counts only where nothing but white space is before it."""


HERMES = ToolFormat({"<tool_call>": _read_hermes}, "</tool_call>", "hermes", separator="\n")
INTERNLM2 = ToolFormat(
    {"<|action_start|><|plugin|>": _read_plugin, _INTERPRETER_BEGIN: _read_code}, _ACTION_END, "internlm"
)
MISTRAL = ToolFormat({"[TOOL_CALLS]": _read_mistral}, None, "mistral")
LLAMA3 = ToolFormat(
    {"<|python_tag|>": _read_llama, "{": lambda body: _read_llama("{" + body)},
    None,
    "llama3_json",
    only_at_start=True,
)
FORMATS = (HERMES, INTERNLM2, MISTRAL, LLAMA3)


class AnswerReader:
    """Tells an answer's calls from its text, piece by piece.

    What may be the beginning of a call is held back until that is known. What begins like a call and is none, as one
    that was cut off, is text: nothing is lost.
    """

    def __init__(self, tool_format: ToolFormat | None) -> None:
        """tool_format: None: all is text."""
        self._format = tool_format
        self._buffer = ""
        self._opening: str | None = None
        self._separator = ""
        self._began = False
        """Whether there was text other than white space."""

    def push(self, text: str) -> list[str | ToolCall]:
        """The texts and calls that are certain now, in their order."""
        if self._format is None:
            return [text] if text else []
        self._buffer += text
        parts: list[str | ToolCall] = []
        while self._advance(self._format, parts):
            pass
        return [part for part in parts if part != ""]

    def finish(self) -> list[str | ToolCall]:
        """What was held back."""
        rest, self._buffer = self._buffer, ""
        if self._format is None or self._opening is None:
            return [rest] if rest else []
        if self._format.closing is None:
            return self._read(self._format, rest, "")
        return [self._separator + self._opening + rest]

    def _advance(self, tool_format: ToolFormat, parts: list[str | ToolCall]) -> bool:
        """Move the buffer's certain part to `parts`; returns whether there may be more."""
        if self._opening is not None:
            if tool_format.closing is None or tool_format.closing not in self._buffer:
                return False
            body, self._buffer = self._buffer.split(tool_format.closing, 1)
            parts += self._read(tool_format, body, tool_format.closing)
            return True
        before = self._next_opening(tool_format)
        if before is None:
            count = self._uncertain(tool_format)
            self._release(self._buffer[: len(self._buffer) - count], parts)
            self._buffer = self._buffer[len(self._buffer) - count :]
            return False
        text = before.removesuffix(tool_format.separator)
        self._separator = before[len(text) :]
        self._release(text, parts)
        return True

    def _next_opening(self, tool_format: ToolFormat) -> str | None:
        """Take the text through the next opening off the buffer; returns what stands before it."""
        if tool_format.only_at_start and (self._began or not self._blank_before_opening(tool_format)):
            return None
        places = {opening: self._buffer.find(opening) for opening in tool_format.openings}
        first = min((place for place in places.values() if place >= 0), default=None)
        if first is None:
            return None
        self._opening = next(opening for opening, place in places.items() if place == first)
        before = self._buffer[:first]
        self._buffer = self._buffer[first + len(self._opening) :]
        return before

    def _blank_before_opening(self, tool_format: ToolFormat) -> bool:
        return self._buffer.lstrip().startswith(tuple(tool_format.openings))

    def _uncertain(self, tool_format: ToolFormat) -> int:
        """Characters at the buffer's end that may belong to a call."""
        if tool_format.only_at_start:
            begun = self._buffer.lstrip()
            may_begin = any(opening.startswith(begun) for opening in tool_format.openings)
            return len(self._buffer) if not self._began and may_begin else 0
        words = [tool_format.separator + opening for opening in tool_format.openings]
        return max(longest_beginning(self._buffer, [*words, *tool_format.openings]), 0)

    def _release(self, text: str, parts: list[str | ToolCall]) -> None:
        self._began = self._began or bool(text.strip())
        parts.append(text)

    def _read(self, tool_format: ToolFormat, body: str, closing: str) -> list[str | ToolCall]:
        opening, self._opening = self._opening, None
        assert opening is not None
        self._began = True
        try:
            calls = tool_format.openings[opening](body)
        except (ValueError, RecursionError):
            calls = []
        return [*calls] or [self._separator + opening + body + closing]


def longest_beginning(text: str, words: Sequence[str]) -> int:
    """Characters at the end of a text that are the beginning of one of some words."""
    longest = max((len(word) for word in words), default=1) - 1
    counts = range(min(longest, len(text)), 0, -1)
    return next((count for count in counts if any(word.startswith(text[-count:]) for word in words)), 0)


def read_answer(text: str, tool_format: ToolFormat | None) -> tuple[str, tuple[ToolCall, ...]]:
    """The text of a whole answer without its calls, and the calls."""
    reader = AnswerReader(tool_format)
    parts = [*reader.push(text), *reader.finish()]
    calls = tuple(part for part in parts if isinstance(part, ToolCall))
    return "".join(part for part in parts if isinstance(part, str)), calls


def tool_format_of(template: Template) -> ToolFormat | None:
    """The format in which a template writes calls, by a call that it renders; None where it writes none that is known.

    Raises nothing for templates that refuse calls.
    """
    for thought in ("", _THOUGHT):
        written = _written_call(template, thought)
        for tool_format in FORMATS if written else ():
            _, calls = read_answer(written, tool_format)
            if [(call.name, call.arguments) for call in calls] == [(_PROBE.name, _PROBE.arguments)]:
                return tool_format
    return None


def call_beginning(template: Template, name: str | None) -> str | None:
    """What an answer begins with that calls a tool of this name, up to the end of the name; None: up to its beginning.

    None where the template writes no calls.
    """
    written = _written_call(template, "") or _written_call(template, _THOUGHT)
    before, found, _ = written.partition(_PROBE.name)
    return before + (name or "") if found else None


def identified(part: str | ToolCall) -> str | ToolCall:
    """A part of an answer; a call with an id that all templates take: Mistral's want nine letters or digits."""
    if isinstance(part, str) or part.id is not None:
        return part
    return replace(part, id="".join(secrets.choice(_ID) for _ in range(9)))


def as_trained(turns: Sequence[Turn], tool_format: ToolFormat | None) -> list[Turn]:
    """Turns with the interpreter's calls and results as InternLM2 is trained on them, in texts; others as they are."""
    if tool_format is not INTERNLM2:
        return list(turns)
    identities: set[str] = set()

    def changed(turn: Turn) -> Turn:
        codes = [call for call in turn.tool_calls if _is_code(call)]
        if codes:
            identities.update(call.id for call in codes if call.id is not None)
            rest = tuple(call for call in turn.tool_calls if call not in codes)
            texts = [_code_text(str(call.arguments["code"])) for call in codes]
            return replace(turn, content="".join((turn.content, *texts)), tool_calls=rest)
        if turn.role == "tool" and (turn.call_id in identities or turn.name == INTERPRETER):
            return Turn("environment", turn.content, name=_INTERPRETER_ROLE)
        return turn

    return [changed(turn) for turn in turns]


def _is_code(call: ToolCall) -> bool:
    return (
        call.name == INTERPRETER
        and set(call.arguments) == {"code"}
        and isinstance(call.arguments["code"], str)
    )


def _code_text(code: str) -> str:
    return f"{_INTERPRETER_BEGIN}\n```python\n{code}\n```{_ACTION_END}"


def _written_call(template: Template, thought: str) -> str:
    """An answer that is a call, as the template writes it, without the end of the turn; "" where it writes none."""
    question = Turn("user", "a")
    try:
        ended, call = (
            template.render(Conversation((question, answer)))
            for answer in (Turn("assistant", "b"), Turn("assistant", thought, tool_calls=(_PROBE,)))
        )
        begin, end = ended.learned[1]
        ending = ended.text[begin:end].rpartition("b")[2]
        begin, end = call.learned[1]
    except UserError:
        return ""
    return call.text[begin:end].removesuffix(ending)
