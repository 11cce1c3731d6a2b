"""The prompt and the answers of a preference row: read, compared, and put in order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, TypeGuard, cast

from tuner.data.conversation import Preference, Turn
from tuner.data.turns import (
    Values,
    expect_text,
    has,
    is_object,
    read_question,
    read_tools,
    read_turn,
    read_weight,
    refuse,
    refuse_media,
    untyped,
)
from tuner.errors import UserError

PROMPTS = (
    *("prompt", "messages", "conversations", "conversation", "instruction", "question", "history"),
    *("trajectory", "input"),
)
"""Keys of the prompt, a text or messages; the first that a row has counts."""
_TRANSCRIPT = re.compile(r"\s*(Human|Assistant): ?", re.MULTILINE)
"""How a turn begins in HH-RLHF's transcripts."""
_LARGEST = 1e30
"""Larger numbers are refused: JSON has no bound, and fp32 overflows at 3.4e38."""

Answer = tuple[Turn, ...]
"""One turn, or several that end with one of the assistant's."""


class IncomparableError(UserError):
    """The answers of a row cannot be compared: they are equal, answer different prompts, or are ranked both ways."""


class Ranking(NamedTuple):
    """A prompt and its answers, in the row's order."""

    prompt: tuple[Turn, ...]
    answers: list[Answer]
    places: Sequence[float]
    """A number for each answer, of which only the order counts; smaller is better."""
    remarks: tuple[str, ...] = ()
    """See Preference."""


def to_preference(row: Values, ranking: Ranking, origin: str) -> Preference:
    """The answers, best first. Raises IncomparableError where they cannot be compared."""
    prompt, places, answers = ranking.prompt, ranking.places, ranking.answers
    refuse_media(row, prompt, origin)
    distinct: dict[Any, tuple[float, Answer]] = {}
    for place, answer in zip(places, answers, strict=True):
        if distinct.setdefault(_content(answer), (place, answer))[0] != place:
            incomparable(
                origin, "the same answer is both better and worse; take the row, or one of the two, out"
            )
    if len(distinct) < 2:
        incomparable(origin, "two different answers are needed for one to be better; take the row out")
    if not any(turn.content.strip() or turn.tool_calls for turn in prompt):
        refuse(origin, "the prompt is empty; write it, or take the row out")
    if row.get("system"):
        prompt = (Turn("system", expect_text(row["system"], '"system"', origin)), *prompt)
    order = sorted(distinct, key=lambda content: distinct[content][0])  # ties stay in the order of the row
    distinct_places = sorted({place for place, _ in distinct.values()})
    ranks = tuple(distinct_places.index(distinct[content][0]) for content in order)
    for rank, content in zip(ranks, order, strict=True):
        if rank == 0 < ranks[-1] and not any(text.strip() or calls != "()" for _, text, _, calls in content):
            incomparable(origin, "the better answer is empty; write it, or take the row out")
    return Preference(
        prompt=prompt,
        answers=tuple(distinct[content][1] for content in order),
        ranks=ranks,
        row_order=tuple(order.index(_content(answer)) for answer in answers),
        condition=read_condition(row, origin),
        margin=_margin(row, len(order), origin),
        tools=read_tools(row, origin),
        weight=read_weight(row, origin),
        remarks=ranking.remarks,
        origin=origin,
    )


def read_answers(value: Any, key: str, prompt: tuple[Turn, ...] | None, origin: str) -> list[Answer]:
    """The answer under a key, or the several of a list of texts."""
    value = untyped_messages(value)
    texts = cast("list[Any]", value) if isinstance(value, list) else []
    if not texts or not isinstance(texts[0], str):
        return [read_side(value, key, prompt, origin)]
    return [read_side(expect_text(text, f'"{key}"', origin), key, prompt, origin) for text in texts]


def read_prompt(row: Values, origin: str) -> tuple[Turn, ...] | None:
    """The row's prompt, apart from its answers; None when it has none of the keys."""
    key = next((key for key in PROMPTS if has(row, key)), None)
    if key is None:
        return None
    if key == "instruction":
        return read_question(row, origin)
    value = untyped_messages(row[key])
    turns = (
        _turns(cast("list[Any]", value), origin)
        if isinstance(value, list)
        else read_text_prompt(value, key, origin)
    )
    if not turns:
        refuse(origin, f'"{key}" is empty; write the prompt')
    return turns


def read_text_prompt(value: Any, key: str, origin: str) -> tuple[Turn, ...]:
    """A text as one user turn, or the turns of an HH-RLHF transcript that ends with "Assistant:"."""
    text = expect_text(value, f'"{key}"', origin)
    if _TRANSCRIPT.match(text) and text.rstrip().endswith("Assistant:"):
        return _transcript(text.rstrip().removesuffix("Assistant:"))
    return (Turn("user", text),)


def read_reference(row: Values, origin: str) -> str:
    """The row's reference answer: a text, or the messages of one. Refuses a row without."""
    if not has(row, "reference"):
        refuse(
            origin,
            'no "reference", which this template compares answers with; write it, or use another template',
        )
    turns = read_side(row["reference"], "reference", (), origin)
    return "\n".join(turn.content for turn in turns)


def read_side(value: Any, key: str, prompt: tuple[Turn, ...] | None, origin: str) -> tuple[Turn, ...]:
    """An answer's turns; where there is no prompt, those of the whole conversation. key: the answer's, for messages."""
    value = untyped_messages(value)
    if isinstance(value, str):
        value = expect_text(value, f'"{key}"', origin)
        turns = _transcript(value) if _TRANSCRIPT.match(value) else ()
        if prompt is not None and not (turns and _content(turns[: len(prompt)]) == _content(prompt)):
            return (Turn("assistant", value),)
        if not turns:
            refuse(origin, f'"{key}" is a text and there is no prompt; write one of {", ".join(PROMPTS)}')
    else:
        turns = _turns(cast("list[Any]", value) if isinstance(value, list) else [value], origin)
    if prompt is not None and turns and turns[0].role != "assistant":
        if _content(turns[: len(prompt)]) != _content(prompt):
            incomparable(
                origin, f'"{key}" begins with another prompt than the row has; both must be the same'
            )
        turns = turns[len(prompt) :]
        if turns and turns[0].role != "assistant":
            incomparable(
                origin, f'"{key}" has a {turns[0].role} turn behind the prompt, where its answer should begin'
            )
    if not turns or turns[-1].role != "assistant":
        refuse(
            origin, f'"{key}" does not end with an answer of the assistant\'s; correct it or take the row out'
        )
    return turns


def common_prompt(
    chosen: tuple[Turn, ...], rejected: tuple[Turn, ...], origin: str
) -> tuple[tuple[Turn, ...], list[tuple[Turn, ...]]]:
    """The turns that two conversations begin with, and the answer that follows in each."""
    # each side keeps a turn for its answer, even where one conversation begins with all of the other
    longest = min(len(chosen), len(rejected)) - 1
    shared = 0
    while shared < longest and _turn_content(chosen[shared]) == _turn_content(rejected[shared]):
        shared += 1
    if not shared:
        incomparable(origin, "chosen and rejected share no prompt; they must be answers to the same one")
    answers = [chosen[shared:], rejected[shared:]]
    for answer in answers:
        if answer[0].role != "assistant":
            incomparable(
                origin,
                f"chosen and rejected part at turn {shared + 1}, which is the {answer[0].role}'s: "
                "they must be answers to the same prompt",
            )
    return chosen[:shared], answers


def untyped_messages(value: Any) -> Any:
    """The messages that a cell of a CSV file spells; any other value as it is."""
    spelled = untyped(value)
    items = cast("list[Any]", spelled) if isinstance(spelled, list) else []
    return (
        items
        if items and all(is_object(item) and ("role" in item or "from" in item) for item in items)
        else value
    )


def _turns(values: list[Any], origin: str) -> tuple[Turn, ...]:
    """Messages with OpenAI's or ShareGPT's keys."""
    turns: list[Turn] = []
    for value in values:
        if is_object(value) and "from" in value and "role" not in value:
            value = {"role": value["from"], "content": value.get("value")}
        turns.append(read_turn(value, origin))
    return tuple(turns)


def _transcript(text: str) -> tuple[Turn, ...]:
    # only behind an empty line: "Human:" in the middle of an answer is text
    _, *parts = re.split(r"(?:^|\n\n)\s*(Human|Assistant):", f"\n\n{text.strip()}")
    roles = ("user" if role == "Human" else "assistant" for role in parts[::2])
    return tuple(Turn(role, text.strip()) for role, text in zip(roles, parts[1::2], strict=True))


def incomparable(origin: str, message: str) -> NoReturn:
    raise IncomparableError(f"{origin}: {message}")


def _turn_content(turn: Turn) -> tuple[Any, ...]:
    return turn.role, turn.content.strip(), turn.name, repr(turn.tool_calls)


def _content(turns: tuple[Turn, ...]) -> tuple[tuple[Any, ...], ...]:
    """What makes turns equal, as a value that can be hashed."""
    return tuple(_turn_content(turn) for turn in turns)


def read_condition(row: Values, origin: str) -> str | None:
    """Name of the preference that the row's answers are judged by."""
    condition = row.get("condition")
    if condition is not None and not (isinstance(condition, str) and condition.strip()):
        refuse(origin, f'"condition" is the name of one, not {condition!r}; leave it out where there is none')
    return condition


def _margin(row: Values, answers: int, origin: str) -> float:
    margin = untyped(row.get("margin"))
    if margin is None:
        return 0.0
    if not is_number(margin) or margin < 0:
        refuse(origin, f'"margin" is a number of at least 0, not {margin!r}')
    if answers > 2:
        refuse(origin, '"margin" belongs to a pair, and this is a list; leave it out')
    return float(margin)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
