"""Row shapes that are read as prompts: every row that has a prompt, whatever answers come with it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tuner.data.answers import (
    Ranking,
    read_condition,
    read_prompt,
    read_reference,
    read_side,
    read_text_prompt,
)
from tuner.data.conversation import Prompt, Turn
from tuner.data.conversation_rows import read_messages, read_sharegpt
from tuner.data.preference_rows import SHAPES as PREFERENCES
from tuner.data.preference_rows import pair_keys
from tuner.data.rollout_rows import KEYS, read_rollout
from tuner.data.row_shapes import Reader, Shape, registered_shapes
from tuner.data.turns import (
    Values,
    expect_list,
    expect_text,
    has,
    read_question,
    read_tools,
    read_turn,
    read_weight,
    refuse,
    refuse_media,
)

_ANSWERS = ("completion", "response", "output")
"""Keys of the answer beside a prompt."""


def prompt_reader(shape: str | None) -> Reader:
    """A reader of prompts; see Reader."""
    return Reader(shape, {**registered_shapes("prompt"), **SHAPES})


def _read_messages(row: Values, origin: str) -> Prompt:
    return _prompt(row, read_messages(row, origin).turns, origin)  # with the row's `system` among the turns


def _read_sharegpt(row: Values, origin: str) -> Prompt:
    return _prompt(row, read_sharegpt(row, origin).turns, origin)


def _read_alpaca(row: Values, origin: str) -> Prompt:
    return _prompt(row, (*_system(row, origin), *read_question(row, origin), *_answer(row, origin)), origin)


def _read_prompt(row: Values, origin: str) -> Prompt:
    """prompt or question: a text, HH-RLHF's transcript, or messages."""
    turns = read_prompt(row, origin) or ()
    return _prompt(row, (*_system(row, origin), *turns, *_answer(row, origin)), origin)


def _read_preference(row: Values, origin: str) -> Prompt:
    """The prompt alone; where the row has none, the better answer's conversation up to its last answer.

    No answer is taken as the reference, since the better of two need not be good.
    """
    turns = read_prompt(row, origin)
    if turns is None:
        better, _ = pair_keys(row)
        if not has(row, better):
            refuse(origin, 'no prompt; write it under "prompt", as a text or messages')
        turns = read_side(row[better], better, None, origin)
    prompt = _prompt(row, (*_system(row, origin), *turns), origin)
    return replace(prompt, reference=_reference(row, origin))


def _prompt_of(rank: Callable[[Values, str], Ranking]) -> Callable[[Values, str], Prompt]:
    """A reader of the prompt alone of a shape of preferences."""

    def read(row: Values, origin: str) -> Prompt:
        return _prompt(row, (*_system(row, origin), *rank(row, origin).prompt), origin)

    return read


def _read_shp(row: Values, origin: str) -> Prompt:
    return _prompt(row, read_text_prompt(row["history"], "history", origin), origin)


def _read_rollout(row: Values, origin: str) -> Prompt:
    """The prompt of a policy's answer, which is no reference: it may be wrong."""
    prompt = _prompt(row, read_rollout(row, origin).turns, origin)
    reference = expect_text(row["reference"], '"reference"', origin) if has(row, "reference") else None
    return replace(prompt, reference=reference)


_OF_ANY_ORDER: dict[str, Callable[[Values, str], Prompt]] = {
    "shp": _read_shp,
    "pair": _read_preference,
    "ranked": _read_preference,
}
"""Shapes of preferences whose prompt can be told whatever the answers are."""

SHAPES: dict[str, Shape] = {
    **{
        name: Shape(_OF_ANY_ORDER.get(name) or _prompt_of(shape.rank), *shape.keys, lists=shape.lists)
        for name, shape in PREFERENCES.items()
    },
    "messages": Shape(_read_messages, ("messages",)),
    "sharegpt": Shape(_read_sharegpt, ("conversations",), ("conversation",)),
    "alpaca": Shape(_read_alpaca, ("instruction",)),
    "rollout": Shape(_read_rollout, KEYS),
    "prompt": Shape(_read_prompt, ("prompt",), ("question",)),
    "prompt_completion": Shape(_read_prompt, ("prompt", "completion"), ("prompt", "response")),
}
"""In the order of recognition; `prompt` also reads rows with a completion."""


def _prompt(row: Values, turns: Sequence[Turn], origin: str) -> Prompt:
    """turns: those of the prompt, and of the answer in the row."""
    end = len(turns)
    while end and turns[end - 1].role == "assistant":
        end -= 1
    prompt, answer = turns[:end], turns[end:]
    refuse_media(row, prompt, origin)
    if not any(turn.role == "user" and turn.content.strip() for turn in prompt):
        roles = ", ".join(turn.role for turn in turns) or "none"
        refuse(origin, f"no user turn with a text to answer (turns: {roles}); write it or take the row out")
    return Prompt(
        turns=tuple(replace(turn, learn=None, weight=1.0) for turn in prompt),
        tools=read_tools(row, origin),
        condition=read_condition(row, origin),
        reference=_reference(row, origin) or (answer[-1].content or None if answer else None),
        values=row,
        weight=read_weight(row, origin),
        origin=origin,
    )


def _system(row: Values, origin: str) -> tuple[Turn, ...]:
    if not row.get("system"):
        return ()
    return (Turn("system", expect_text(row["system"], '"system"', origin)),)


def _answer(row: Values, origin: str) -> tuple[Turn, ...]:
    """The turns of the answer beside the prompt; none of one that the row calls undesirable, which is no reference."""
    key = next((key for key in _ANSWERS if has(row, key)), None)
    if key is None or row.get("label") is False:
        return ()
    value: Any = row[key]
    if isinstance(value, str):
        return (Turn("assistant", value),)
    return tuple(read_turn(message, origin) for message in expect_list(value, f'"{key}"', origin))


def _reference(row: Values, origin: str) -> str | None:
    """`reference`, as a text or messages, or `answer` where it is a text.

    Sets for rule-based rewards also have numbers and lists under `answer`.
    """
    if has(row, "reference"):
        if isinstance(row["reference"], list):
            return read_reference(row, origin)
        return expect_text(row["reference"], '"reference"', origin)
    return row["answer"] if isinstance(row.get("answer"), str) else None
