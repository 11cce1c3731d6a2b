"""Chat templates as programs: Jinja in a sandbox, and the marks by which a text says which parts are answers."""

import json
import secrets
from collections.abc import Collection
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from tuner.data.control_tokens import BEGIN, END
from tuner.data.sandbox import BoundedSandbox

TODAY = datetime(2024, 7, 26)
"""The date that templates get: Llama 3.1's default, a constant so that the data do not change from day to day."""

_MARK = f"\ue000{secrets.token_hex(16)}\ue000"
"""Marks both ends of an assistant turn; random in every process, so that no row can contain it."""


class MarkedText(NamedTuple):
    """A text as a template renders it, without marks."""

    text: str
    answers: list[tuple[int, int]]
    """(first character, one past the last) of the parts marked by `{% generation %}`."""
    spelled: frozenset[int] = frozenset()
    """First characters of the control tokens that turns spell."""


def extract_marks(text: str, names: Collection[str] = ()) -> MarkedText:
    """A rendered text without its marks, and where they stood. names: of control tokens that may be marked."""
    answers: list[tuple[int, int]] = []
    spelled: list[int] = []
    position = 0
    for index, part in enumerate(text.split(_MARK)):
        begin = position
        for number, piece in enumerate(part.split(BEGIN)):
            name, end, _ = piece.partition(END)
            if number and end and name in names:  # else the template has taken it out, and left a mark
                spelled.append(position)
            position += len(piece.replace(END, ""))
        if index % 2:
            answers.append((begin, position))
    plain = text.replace(_MARK, "").replace(BEGIN, "").replace(END, "")
    return MarkedText(plain, answers, frozenset(spelled))


class _Generation(Extension):
    """transformers' tag `{% generation %}...{% endgeneration %}`, which here writes a mark at both ends.

    transformers calls a macro that measures the output so far; marks cost no more than a split of the text.
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
    """JSON without the HTML escapes of Jinja's own filter, as in transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **settings)


def reason(error: Exception) -> str:
    """What a template failed of. A bare KeyError or MemoryError says nothing without its name."""
    return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"


def _environment() -> BoundedSandbox:
    """The functions and filters that chat templates on the hub rely on (transformers' chat_template_utils)."""
    # sandboxed: templates come with downloaded checkpoints. Other white-space settings than transformers'
    # would give other tokens
    environment = BoundedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    # jinja2 declares both as bare dict
    cast("dict[str, Any]", environment.filters)["tojson"] = _tojson  # pyright: ignore[reportUnknownMemberType]
    variables = cast("dict[str, Any]", environment.globals)  # pyright: ignore[reportUnknownMemberType]
    variables |= {"raise_exception": _raise, "strftime_now": TODAY.strftime}
    return environment


ENVIRONMENT = _environment()


@lru_cache(maxsize=32)
def compiled(source: str) -> jinja2.Template:
    """A template's program. Cached: a run makes half a dozen templates of the same source, and compiling one takes
    longer than rendering a hundred rows."""
    return ENVIRONMENT.from_string(source)
