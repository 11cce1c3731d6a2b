"""A chat template as texts around turns, and as an Ollama template (Go's text/template)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tuner.data.conversation import Conversation, Turn
from tuner.data.template import Template
from tuner.errors import UserError

_CONTENT = "{{ .Content }}"
_SYSTEM, _USER, _ANSWER, _NEXT = "Sysone", "Userone", "Answerone", "Usertwo"
_PROBES = (
    (("user", "Hi there."),),
    (("system", "Be brief."), ("user", "Hi?")),
    (("user", "One"), ("assistant", "Two"), ("user", "Three"), ("assistant", "Four"), ("user", "Five")),
    (("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")),
)
"""Conversations that a chat format must render as its template does."""


@dataclass(frozen=True)
class ChatFormat:
    """The texts that a chat template writes before and behind the content of turns."""

    begin: str
    """The begin token, where the template writes it."""
    no_system: str
    """What stands in the place of a system turn where there is none: a default one."""
    system: tuple[str, str]
    """Before and behind a system turn; before and behind its text where `system_in_user`."""
    system_in_user: bool
    """Whether the system turn's text stands inside the first user turn."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    header: str
    """What an answer is generated behind."""

    def render(self, turns: Sequence[tuple[str, str]]) -> str:
        """A prompt of (role, content) turns."""
        system = turns[0][1] if turns[0][0] == "system" else None
        text = self.begin + (self.no_system if system is None else "")
        first = True
        for role, content in turns:
            before, behind = {"system": self.system, "user": self.user, "assistant": self.assistant}[role]
            if role == "system" and self.system_in_user:
                continue
            if role == "user" and first and system is not None and self.system_in_user:
                content = system.join(self.system) + content
            first = first and role != "user"
            text += before + content + behind
        return text + self.header

    def for_ollama(self, begins_with_bos: bool) -> str:
        """The same as a Go template. begins_with_bos: the program puts the begin token before the prompt itself."""
        lines = [] if begins_with_bos else [_text(self.begin)]
        if self.no_system:
            lines.append("{{- if not .System }}" + _text(self.no_system) + "{{- end }}")
        if self.system_in_user:
            system = "{{- if and $first $.System }}" + _around(self.system, "{{ $.System }}") + "{{- end }}"
            user = _around(self.user, system + "{{- $first = false }}" + _CONTENT)
            lines += ["{{- $first := true }}", "{{- range .Messages }}", '{{- if eq .Role "user" }}' + user]
        else:
            lines += ["{{- range .Messages }}", '{{- if eq .Role "system" }}' + _around(self.system)]
            lines.append('{{- else if eq .Role "user" }}' + _around(self.user))
        lines.append('{{- else if eq .Role "assistant" }}' + _around(self.assistant))
        lines += ["{{- end }}", "{{- end }}", _text(self.header)]
        return "\n".join(line for line in lines if line)


def chat_format(tokenizer: Any) -> ChatFormat | None:
    """The format of a tokenizer's chat template; None where it has none, or writes turns in no such way."""
    if not tokenizer.chat_template:
        return None
    try:
        template = Template("tokenizer", tokenizer)
        measured = _measure(template, tokenizer.bos_token or "")
        for probe in _PROBES if measured else ():
            if measured is None or measured.render(probe) != _prompt(template, *probe):
                return None
    except UserError:  # a template that refuses one of the conversations
        return None
    return measured


def _measure(template: Template, bos: str) -> ChatFormat | None:
    """The texts between stand-ins for contents."""
    user, answer, following = ("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)
    before, behind = _between(_prompt(template, user), _USER)
    texts = _between(_prompt(template, user, answer, following), _USER, _ANSWER, _NEXT)
    with_system = _between(_prompt(template, ("system", _SYSTEM), user), _SYSTEM, _USER)
    # SmolLM's begin token opens every turn
    begin = bos if bos and before.startswith(bos) and not texts[2].endswith(before) else ""
    before = before.removeprefix(begin)
    # a default system turn stands only before the first user turn
    user_before = before if texts[2].endswith(before) else _common_suffix(before, texts[2])
    no_system = before.removesuffix(user_before)
    opening, joint = with_system[0].removeprefix(begin), with_system[1]
    in_user = not no_system and opening == user_before
    if in_user:
        system = ("", joint)
    elif joint.endswith(user_before):
        system = (opening, joint.removesuffix(user_before))
    else:
        return None
    answer_behind = texts[2].removesuffix(user_before)
    user_behind = _common_prefix(behind, texts[1])
    if behind == texts[1]:
        # where the user's turn ends and the header begins cannot be seen; most templates end all turns alike
        user_behind = answer_behind if behind.startswith(answer_behind) else ""
    return ChatFormat(
        begin,
        no_system,
        system,
        in_user,
        (user_before, user_behind),
        (texts[1].removeprefix(user_behind), answer_behind),
        behind.removeprefix(user_behind),
    )


def _prompt(template: Template, *turns: tuple[str, str]) -> str:
    return template.prompt_text(Conversation(tuple(Turn(*turn) for turn in turns), origin="chat format"))


def _between(text: str, *contents: str) -> list[str]:
    """The texts before, between and behind contents."""
    parts = []
    for content in contents:
        before, _, text = text.partition(content)
        parts.append(before)
    return [*parts, text]


def _common_suffix(one: str, other: str) -> str:
    return _common_prefix(one[::-1], other[::-1])[::-1]


def _common_prefix(one: str, other: str) -> str:
    return "".join(
        letter for letter, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    )


def _around(texts: tuple[str, str], content: str = _CONTENT) -> str:
    return _text(texts[0]) + content + _text(texts[1])


def _text(text: str) -> str:
    """A constant of a Go template: as such, no white space of it is trimmed, and no braces of it are read."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""
