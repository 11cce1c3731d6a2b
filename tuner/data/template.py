"""Chat templates: a conversation to one text, and the spans of it that are learned.

A template is a Jinja file as transformers reads them, run in Jinja's sandbox. Assistant turns are marked by
`{% generation %}`; a template without marks (most tokenizers' own) has its spans found by rendering prefixes.
"""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tuner.data.conversation import Conversation, Turn
from tuner.data.encoding import Tokenizer, adds_bos, encode, is_one_token
from tuner.errors import UserError
from tuner.resources import chat_templates_folder

Learn = Literal["assistant", "last", "all"]

TODAY = datetime(2024, 7, 26)
"""What a template that asks for the date gets: Llama 3.1's default, so that data do not change overnight."""

_MARK = f"\ue000{secrets.token_hex(16)}\ue000"
"""Stands where a learned span begins or ends; drawn anew in every process, so that no row can hold it."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    spans: (first character, one past the last, weight) of the learned parts; a later one overrides.
    """

    text: str
    spans: list[tuple[int, int, float]] = field(default_factory=list)
    origin: str = ""


class Template:
    """A chat template for one tokenizer.

    Raises UserError when it is unknown, is no Jinja, or needs special tokens that the tokenizer splits.
    """

    def __init__(self, name: str, tokenizer: Tokenizer):
        self.name = name
        self.source = find_source(name, tokenizer)
        self._tokenizer = tokenizer
        self._marked = bool(re.search(r"{%-?\s*generation\b", self.source))
        try:
            self._jinja = _ENVIRONMENT.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"template {name!r}, line {error.lineno}: {error.message}; correct the template"
            ) from error
        self._values = self._special_values()
        self._check_special_tokens("special tokens")
        self._extras_checked = not re.search(r"with tools or names:", self.source)

    def render(self, conversation: Conversation, learn: Learn = "assistant") -> Rendered:
        """The conversation as text with its learned spans.

        learn: every assistant turn, the last one, or everything; a turn's own `learn` and `weight` go first.
        Raises UserError with the row's origin when the template refuses it or is not prefix-stable.
        """
        turns = conversation.turns
        text, marks = self._render(conversation)
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        found = dict(zip(answers, marks, strict=False))
        if self._marked and len(marks) != len(answers):
            raise UserError(
                f"{conversation.origin}: template {self.name!r} marked {len(marks)} learned parts for "
                f"{len(answers)} assistant turns; "
                "put {% generation %} around every assistant turn"
            )
        spans = [(0, len(text), conversation.weight)] if learn == "all" else []
        for index, turn in enumerate(turns):
            weight = _weight(turn, index, answers[-1:], learn) * conversation.weight
            if weight == (conversation.weight if learn == "all" else 0):
                continue
            whole_turn = not weight and turn.role != "assistant"
            span = found.get(index) or self._span_by_prefix(conversation, index, text, whole_turn)
            spans.append((*span, weight))
        return Rendered(text, spans, conversation.origin)

    def prompt_text(self, conversation: Conversation) -> str:
        """The conversation as text with the header of the answer to come."""
        return self._render(conversation, header=True)[0]

    def render_prompt(self, conversation: Conversation) -> list[int]:
        """Token ids of the conversation and the header of the answer to come."""
        return encode(self._tokenizer, [self.prompt_text(conversation)])[0]

    def _render(
        self, conversation: Conversation, turns: tuple[Turn, ...] | None = None, header: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        turns = conversation.turns if turns is None else turns
        if not self._extras_checked and (
            conversation.tools or any(turn.name or turn.tool_calls for turn in turns)
        ):
            self._check_special_tokens("with tools or names")
            self._extras_checked = True
        try:
            marked = self._jinja.render(
                messages=[_message(turn) for turn in turns],
                tools=list(conversation.tools) or None,
                add_generation_prompt=header,
                **self._values,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"{conversation.origin}: template {self.name!r} cannot render this conversation: {error}"
            ) from error
        return _take_marks(marked)

    def _span_by_prefix(
        self, conversation: Conversation, index: int, text: str, whole_turn: bool
    ) -> tuple[int, int]:
        """Where turn `index` stands in the text: between what is rendered without it and with it.

        An assistant turn starts behind the header of an answer, any other at the first character of its text,
        unless the whole turn is asked for. Both end before trailing white space.
        """
        turns, turn = conversation.turns, conversation.turns[index]
        start, _ = self._render(conversation, turns[:index], turn.role == "assistant") if index else ("", [])
        through, _ = self._render(conversation, turns[: index + 1])
        if not (text.startswith(start) and text.startswith(through) and len(start) < len(through)):
            raise UserError(
                f"{conversation.origin}: template {self.name!r} is not prefix-stable: it renders turn "
                f"{index + 1} ({turn.role}) differently when others follow, so its span is unknown; "
                f"use one of {', '.join(names())}"
            )
        begin, end = len(start), len(through.rstrip())
        if turn.role != "assistant" and not whole_turn:
            begin = text.find(turn.content.strip(), begin)
            if begin < 0 or begin > end:
                raise UserError(
                    f"{conversation.origin}: template {self.name!r} rewrites turn {index + 1} ({turn.role}), "
                    "so it cannot be learned apart; take its learn switch out"
                )
        return begin, len(through) if whole_turn else end

    def _special_values(self) -> dict[str, Any]:
        """What the template knows of the tokenizer, as transformers passes it."""
        tokenizer = self._tokenizer
        if "eos_token" in self.source and tokenizer.eos_token is None:
            raise UserError(
                f"template {self.name!r} ends answers with the end token, and the tokenizer has none; set it"
            )
        special = {
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        bos = tokenizer.bos_token or ""
        return {**special, "bos_token": bos, "text_bos": bos if adds_bos(tokenizer) else ""}

    def _check_special_tokens(self, heading: str) -> None:
        """Every token that the head of ours, or of a user's file, names under `heading` must be one token."""
        line = re.search(rf"{heading}: (.+)", self.source) if self.name != "tokenizer" else None
        split = (
            [token for token in line[1].split() if not is_one_token(self._tokenizer, token)] if line else []
        )
        if split:
            raise UserError(
                f"template {self.name!r} needs {', '.join(split)}, which this tokenizer splits into pieces; "
                "use the template of the model's family, or add the tokens to the tokenizer"
            )


def names() -> list[str]:
    """The templates that come with tuner."""
    return sorted(file.stem for file in chat_templates_folder().glob("*.jinja"))


def find_source(name: str, tokenizer: Tokenizer) -> str:
    """The text of the template a config names: one of ours, a .jinja file, or "tokenizer", its own."""
    if name == "tokenizer":
        own = getattr(tokenizer, "chat_template", None)
        own = own.get("default") if isinstance(own, Mapping) else own
        if not own:
            raise UserError(
                f"this model's tokenizer has no chat template; set data.template to one of {_ours()}"
            )
        return own
    file = Path(name) if name.endswith(".jinja") else chat_templates_folder() / f"{name}.jinja"
    if not file.is_file():
        raise UserError(
            f'template {name!r}: no such template; write "tokenizer", a .jinja file, or one of {_ours()}'
        )
    return file.read_text(encoding="utf-8")


def _ours() -> str:
    return ", ".join(names())


def _weight(turn: Turn, index: int, last_answer: list[int], learn: Learn) -> float:
    """The weight of a turn's tokens, before the row's: its own switch first, then the config's `learn`."""
    if turn.learn is not None:
        return turn.weight if turn.learn else 0.0
    learned = learn == "all" or (turn.role == "assistant" if learn == "assistant" else [index] == last_answer)
    return turn.weight if learned else 0.0


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as the message a template expects: absent keys are absent."""
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


def _take_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the (begin, end) of what stood between each pair of them."""
    parts = marked.split(_MARK)
    spans, position = [], 0
    for index, part in enumerate(parts):
        if index % 2:
            spans.append((position, position + len(part)))
        position += len(part)
    return "".join(parts), spans


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, transformers' tag: here it writes a mark on either side.

    transformers calls a macro and measures what was written so far; a mark costs a string split.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_literal(_MARK), *body, _literal(_MARK)]


def _literal(text: str) -> nodes.Node:
    return nodes.Output([nodes.TemplateData(text)])


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **settings: Any) -> str:
    """JSON without the escapes for HTML that Jinja's own filter writes; as transformers does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **settings)


def _environment() -> jinja2.Environment:
    """The names and filters that chat templates on the hub rely on (transformers' chat_template_utils)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TODAY.strftime
    return environment


_ENVIRONMENT = _environment()
