"""What a conversation says and its rendered text does not: the one check that nothing is lost on the way.

Texts are compared without white space, since templates trim and indent.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from tuner.config.data import Droppable
from tuner.data.conversation import Conversation, Turn
from tuner.errors import UserError

THOUGHT_END = "</think>"
"""What ends the reasoning in a turn's text; the answer follows."""
_THOUGHT = "<think>"


class LostContentError(UserError):
    """A row holds something that would not reach the text."""

    def __init__(self, message: str, content: Droppable):
        """content: what is lost, as the config's `drop` names it."""
        super().__init__(message)
        self.content: Droppable = content


def check_nothing_is_lost(
    conversation: Conversation,
    text: str,
    learned: Mapping[int, tuple[int, int]],
    template: str,
    ignores_tools: Callable[[], bool],
) -> None:
    """Raise LostContentError where the text of a conversation lacks something of it.

    learned: turn -> (first character, one past the last) of the part the loss is taken on, which must hold all that an
    assistant's turn says and calls. Of the other turns the text is looked for anywhere, without earlier reasoning.
    template: its name, for messages. ignores_tools: whether it renders the same without the tools.
    """
    whole = _Written(text)
    for index, turn in enumerate(conversation.turns):
        where = f"{conversation.origin}: turn {index + 1} ({turn.role})"
        span = learned.get(index)
        own = span is not None and turn.role == "assistant"
        written = _Written(text[slice(*span)]) if own and span is not None else whole
        _check_text(turn, written, own, where, template)
        for call in turn.tool_calls:
            if not all(map(written.has, (call.name, *_leaves(call.arguments)))):
                raise LostContentError(
                    f"{where} calls {call.name}, and template {template!r} does not write the whole call; "
                    "use one that has calls (internlm2, qwen, llama3, mistral)",
                    "calls",
                )
    if conversation.tools:
        _check_tools(conversation, whole, template, ignores_tools())


def split_reasoning(turn: Turn) -> tuple[str, str]:
    """(reasoning, answer) of an assistant's turn; the reasoning is "" where nothing ends it."""
    reasoning, _, answer = turn.content.rpartition(THOUGHT_END)
    return reasoning.strip().removeprefix(_THOUGHT), answer


class _Written:
    """A text, and whether a shorter one stands in it: as it is, in JSON's escapes, or with other white space."""

    def __init__(self, text: str):
        self._text = text
        self._squeezed: str | None = None

    def has(self, part: str) -> bool:
        if part.strip() in self._text:
            return True
        if self._squeezed is None:
            self._squeezed = _squeeze(self._text)
        escaped = (json.dumps(part, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
        return any(_squeeze(form) in self._squeezed for form in (part, *escaped))


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _check_text(turn: Turn, written: _Written, own: bool, where: str, template: str) -> None:
    """own: whether the turn is learned, so that its reasoning must be there, too."""
    if turn.role == "assistant":
        reasoning, answer = split_reasoning(turn)
        if own and not written.has(reasoning):
            raise LostContentError(
                f"{where}: template {template!r} leaves the reasoning before {THOUGHT_END} out of what is learned; "
                "use a template that keeps it",
                "reasoning",
            )
        parts = [answer]
    elif turn.input:
        parts = [turn.content.removesuffix(turn.input), turn.input]
    else:
        parts = [turn.content]
    for part in parts:
        if not written.has(part):
            raise LostContentError(
                f"{where}: template {template!r} does not write all of its text ({' '.join(part.split())!r:.60}); "
                "use another template",
                "text",
            )


def _check_tools(conversation: Conversation, whole: _Written, template: str, ignored: bool) -> None:
    for tool in conversation.tools:
        function: Mapping[str, Any] = tool["function"]
        described = [function["name"], *_leaves(function.get("description"))]
        parameters: Any = function.get("parameters")
        properties: Any = parameters.get("properties") if isinstance(parameters, Mapping) else None  # type: ignore[union-attr]
        if isinstance(properties, Mapping):
            described += [str(name) for name in cast("Mapping[str, Any]", properties)]
        if ignored or not all(map(whole.has, described)):
            raise LostContentError(
                f"{conversation.origin}: template {template!r} does not write the tools of this conversation "
                f"({function['name']}); use one that has tools (internlm2, qwen, llama3, mistral)",
                "tools",
            )


def _leaves(value: Any) -> Iterator[str]:
    """The names and values in JSON values as texts, without null and booleans, which templates write in many ways."""
    if isinstance(value, Mapping):
        for name, item in cast("Mapping[str, Any]", value).items():
            yield str(name)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in cast("list[Any]", value):
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
