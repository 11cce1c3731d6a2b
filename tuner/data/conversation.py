"""What a row means: a conversation of turns, or a document."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

ROLES = ("system", "user", "assistant", "tool", "environment")
"""`tool` is OpenAI's result of a call; `environment` is InternLM2's, whose name says what it comes from."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the assistant makes: a tool's name and its arguments, a JSON object."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str
    name: str | None = None
    """What stands after the role in families that show it: InternLM2's `system name=<|plugin|>`."""
    tool_calls: tuple[ToolCall, ...] = ()
    learn: bool | None = None
    """Whether this turn is learned; None leaves it to the config's `learn`."""
    weight: float = 1.0
    """Factor on the weight of the turn's learned tokens; 0 = not learned."""
    call_id: str | None = None
    """Which call a tool's result answers."""
    input: str | None = None
    """Alpaca's `input`; `content` ends with it. Only the alpaca template shows it apart."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, and the tools the assistant may call (JSON objects as OpenAI writes them)."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    """Factor on the weight of every learned token of the row."""
    origin: str = ""
    """`file:line`, for messages."""

    def with_system(self, system: str) -> "Conversation":
        """This conversation behind a system turn, unless it opens with a (nameless) one of its own."""
        first = self.turns[0] if self.turns else None
        if first is not None and first.role == "system" and first.name is None:
            return self
        return replace(self, turns=(Turn("system", system), *self.turns))


@dataclass(frozen=True, slots=True)
class Document:
    """Raw text for continued pre-training."""

    text: str
    weight: float = 1.0
    origin: str = ""
