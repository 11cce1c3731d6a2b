"""What a row means: a conversation of turns, a document, a prompt, or answers of which the better are known."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
        return self if self._opens_with_system else self.behind(system)

    def behind(self, system: str) -> "Conversation":
        """This conversation with a text at the head of its opening (nameless) system turn, made if there is none.

        One turn and not two: few templates take a second one.
        """
        if not self._opens_with_system:
            return replace(self, turns=(Turn("system", system), *self.turns))
        first, *others = self.turns
        joined = replace(first, content=f"{system}\n\n{first.content}")
        return replace(self, turns=(joined, *others))

    @property
    def _opens_with_system(self) -> bool:
        return bool(self.turns) and self.turns[0].role == "system" and self.turns[0].name is None


@dataclass(frozen=True, slots=True)
class Document:
    """Raw text for continued pre-training."""

    text: str
    weight: float = 1.0
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that a policy is to answer."""

    turns: tuple[Turn, ...]
    """The row's, up to its last answer."""
    tools: tuple[Mapping[str, Any], ...] = ()
    system: str | None = None
    """What the policy is told before these turns where they open with no system turn; no reward model sees it."""
    condition: str | None = None
    """Name of what makes an answer better here."""
    reference: str | None = None
    """The text of the answer in the row."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The row as in its file, and its `condition`."""
    weight: float = 1.0
    """0: the row is switched off. Any other is without effect."""
    origin: str = ""
    """`file:line`, for messages."""

    def asked(self) -> Conversation:
        """What the policy is to answer."""
        conversation = Conversation(self.turns, self.tools, origin=self.origin)
        return conversation if self.system is None else conversation.with_system(self.system)

    def answered(self, answer: str) -> Conversation:
        """The row's turns with an answer, which alone is learned: what a reward model judges, under the condition."""
        turns = tuple(replace(turn, learn=False) for turn in self.turns)
        return Conversation((*turns, Turn("assistant", answer)), self.tools, origin=self.origin)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two or more answers to one prompt, the better first."""

    prompt: tuple[Turn, ...]
    answers: tuple[tuple[Turn, ...], ...]
    """All different; each a turn, or several that end with one of the assistant's."""
    ranks: tuple[int, ...]
    """Of each answer, from 0 on and never falling: equal ranks are a tie."""
    given: tuple[int, ...] = ()
    """Which of the answers each one in the row is, in the row's order."""
    condition: str | None = None
    """Name of what makes an answer better here."""
    margin: float = 0.0
    """Score by which the better answer of a pair must lead."""
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    """Factor on the weight of the row's pairs and answers."""
    origin: str = ""
    """`file:line`, for messages."""

    def conversation(self, answer: int, system: str | None = None) -> Conversation:
        """The prompt with one of the answers, of which alone the answer is learned, behind a system text."""
        prompt = tuple(replace(turn, learn=False) for turn in self.prompt)
        turns = prompt + tuple(replace(turn, learn=None, weight=1.0) for turn in self.answers[answer])
        conversation = Conversation(turns, self.tools, origin=self.origin)
        return conversation if system is None else conversation.behind(system)
