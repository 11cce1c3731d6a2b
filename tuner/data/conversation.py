"""What a row is read as: a conversation of turns, a document, a prompt, or ranked answers to a prompt."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ROLES = ("system", "user", "assistant", "tool", "environment")
"""`tool` is OpenAI's result of a call; `environment` is InternLM2's, whose name tells the tool it comes from."""


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
    """Written after the role by the families that show it: InternLM2's `system name=<|plugin|>`."""
    tool_calls: tuple[ToolCall, ...] = ()
    learn: bool | None = None
    """Whether the loss is taken on this turn; None leaves it to the config's `learn`."""
    weight: float = 1.0
    """Factor on the loss weight of the turn's tokens; 0 takes no loss on it."""
    call_id: str | None = None
    """Id of the call that a tool's result answers."""
    input: str | None = None
    """Alpaca's `input`; `content` ends with it. Only the alpaca template shows it separately."""


REFERENCE = "reference"
"""Name of the environment turn before an answer that a reward model compares it with (template `polar`)."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, and the tools the assistant may call (JSON objects as OpenAI writes them)."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    """Factor on the loss weight of every token of the row."""
    origin: str = ""
    """`file:line`, for messages."""

    def with_system(self, system: str) -> "Conversation":
        """This conversation with a system turn before it, unless it opens with a (nameless) one of its own."""
        return self if self._opens_with_system else self.prepend_system(system)

    def prepend_system(self, system: str) -> "Conversation":
        """This conversation with a text put before its opening (nameless) system turn's, or as one if there is none.

        The texts share one turn, since few templates accept a second system turn.
        """
        if not self._opens_with_system:
            return replace(self, turns=(Turn("system", system), *self.turns))
        first, *rest = self.turns
        joined = replace(first, content=f"{system}\n\n{first.content}")
        return replace(self, turns=(joined, *rest))

    def with_reference(self, reference: str) -> "Conversation":
        """This conversation with a reference before its last answer."""
        last = max(
            (place for place, turn in enumerate(self.turns) if turn.role == "assistant"),
            default=len(self.turns),
        )
        turn = Turn("environment", reference, name=REFERENCE)
        return replace(self, turns=(*self.turns[:last], turn, *self.turns[last:]))

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
    """The row's turns up to its last answer."""
    tools: tuple[Mapping[str, Any], ...] = ()
    system: str | None = None
    """System prompt of the policy where the turns do not open with one; no reward model sees it."""
    condition: str | None = None
    """Name of the preference that an answer is judged by."""
    reference: str | None = None
    """Reference answer: the row's own."""
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The row as in its file, and its `condition`: what rule-based rewards read."""
    weight: float = 1.0
    """0 switches the row off; any other value has no effect."""
    origin: str = ""
    """`file:line`, for messages."""

    def policy_input(self) -> Conversation:
        """The conversation that the policy answers, with its system prompt."""
        conversation = Conversation(self.turns, self.tools, origin=self.origin)
        return conversation if self.system is None else conversation.with_system(self.system)

    def with_answer(self, answer: str, with_reference: bool = False) -> Conversation:
        """The row's turns and an answer, without the policy's system prompt: what a reward model scores.

        with_reference: put the row's reference before the answer, where it has one. Only the answer is marked for the
        loss, so that its span can be found.
        """
        turns = tuple(replace(turn, learn=False) for turn in self.turns)
        conversation = Conversation((*turns, Turn("assistant", answer)), self.tools, origin=self.origin)
        if with_reference and self.reference is not None:
            return conversation.with_reference(self.reference)
        return conversation


@dataclass(frozen=True, slots=True)
class Preference:
    """Answers to one prompt, best first: two or more, or for KTO one alone."""

    prompt: tuple[Turn, ...]
    answers: tuple[tuple[Turn, ...], ...]
    """All different; each one turn, or several that end with one of the assistant's."""
    ranks: tuple[int, ...]
    """Rank of each answer, counted from 0 and never decreasing; equal ranks are a tie. An answer alone, which KTO is
    trained on, has rank 0 where it is desirable, else 1."""
    row_order: tuple[int, ...] = ()
    """Index into `answers` of every answer of the row, in the row's order; equal answers share one."""
    condition: str | None = None
    """Name of the preference that the answers are ranked by."""
    margin: float = 0.0
    """Score by which the better answer of a pair must lead."""
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    """Factor on the weight of the row's pairs and answers."""
    remarks: tuple[str, ...] = ()
    """What the user should know of such rows, as predicates of "rows ..."; the report counts each."""
    origin: str = ""
    """`file:line`, for messages."""

    def with_reference(self, reference: str) -> "Preference":
        """This row with a reference that all its answers are compared with."""
        return replace(self, prompt=(*self.prompt, Turn("environment", reference, name=REFERENCE)))

    def conversation(self, answer: int, system: str | None = None) -> Conversation:
        """The prompt and one of the answers, the loss on the answer alone; system: a text for the system turn."""
        prompt = tuple(replace(turn, learn=False) for turn in self.prompt)
        # an answer's own switches are dropped: its first token in the loss is taken as its beginning
        turns = prompt + tuple(replace(turn, learn=None, weight=1.0) for turn in self.answers[answer])
        conversation = Conversation(turns, self.tools, origin=self.origin)
        return conversation if system is None else conversation.prepend_system(system)
