"""Row shapes that are read as preferences: pairs and ranked lists, as published sets write them."""

from __future__ import annotations

import re
from typing import Any, NoReturn, TypeGuard, cast

from tuner.data.conversation import Preference, Turn
from tuner.data.row_shapes import Reader, Shape, registered_shapes
from tuner.data.turns import (
    Values,
    expect_list,
    expect_text,
    has,
    is_object,
    read_question,
    read_tools,
    read_turn,
    read_weight,
    refuse,
    refuse_media,
)
from tuner.errors import UserError

_PROMPTS = ("prompt", "messages", "conversations", "conversation", "instruction", "question", "history")
"""Keys of the prompt, a text or messages; the first that a row has counts."""
_TRANSCRIPT = re.compile(r"\s*(Human|Assistant): ?", re.MULTILINE)
"""How a turn begins in HH-RLHF's transcripts."""
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
)
"""Keys of a pair's scores in published sets; equal scores are a tie."""
_ANSWERS = ("answers", "responses", "completions")
_LARGEST = 1e30
"""Larger numbers are refused: JSON has no bound, and fp32 overflows at 3.4e38."""


class IncomparableError(UserError):
    """The answers of a row cannot be compared: they are equal, or answer different prompts."""


def preference_reader(shape: str | None) -> Reader:
    """A reader of preference rows; see Reader."""
    return Reader(shape, {**registered_shapes("preference"), **SHAPES})


def _read_pair(row: Values, origin: str) -> Preference:
    """chosen and rejected: texts or messages, of the answer or of the whole conversation, prompt included."""
    prompt = read_prompt(row, origin)
    sides = [read_side(row[key], key, prompt, origin) for key in ("chosen", "rejected")]
    if prompt is None:
        prompt, sides = _common_prompt(sides[0], sides[1], origin)
    tied = any(has(row, chosen) and row[chosen] == row.get(rejected) for chosen, rejected in _SCORES)
    return _preference(row, prompt, sides, [0, 0] if tied else [0, 1], origin)


def _read_shp(row: Values, origin: str) -> Preference:
    """Stanford Human Preferences: labels=1 prefers answer A."""
    if row["labels"] not in (0, 1):
        refuse(origin, f'"labels" is 1 where A is better and 0 where B is, not {row["labels"]!r}')
    prompt = read_text_prompt(row["history"], "history", origin)
    sides = [read_side(row[f"human_ref_{side}"], f"human_ref_{side}", prompt, origin) for side in "AB"]
    return _preference(row, prompt, sides, [1 - row["labels"], row["labels"]], origin)


def _read_ranked(row: Values, origin: str) -> Preference:
    """Several answers with "scores" (higher is better) or "ranks" (1 is the best), beside the answers or in each."""
    prompt = read_prompt(row, origin)
    if prompt is None:
        refuse(origin, f"no prompt; write one of {', '.join(_PROMPTS)}")
    key = next(key for key in _ANSWERS if has(row, key))
    answers = expect_list(row[key], f'"{key}"', origin)
    objects: list[Values] = [answer if is_object(answer) else {} for answer in answers]
    sides = [read_side(_answer_value(answer), key, prompt, origin) for answer in answers]
    ranks = row.get("ranks") or [answer.get("rank") for answer in objects]
    scores = row.get("scores") or [answer.get("score", answer.get("overall_score")) for answer in objects]
    values, sign = (scores, -1.0) if ranks == [None] * len(answers) else (ranks, 1.0)
    values = expect_list(values, '"ranks" or "scores"', origin)
    places = [sign * value for value in values if _is_number(value)]
    if not len(places) == len(values) == len(answers):
        refuse(origin, f'"ranks" or "scores" must be a list of {len(answers)} numbers, one for each answer')
    return _preference(row, prompt, sides, places, origin)


SHAPES = {
    "shp": Shape(_read_shp, ("history", "human_ref_A", "human_ref_B", "labels")),
    "pair": Shape(_read_pair, ("chosen", "rejected")),
    "ranked": Shape(_read_ranked, *((key,) for key in _ANSWERS)),
}
"""In the order of recognition."""


def _preference(
    row: Values, prompt: tuple[Turn, ...], answers: list[tuple[Turn, ...]], places: list[float], origin: str
) -> Preference:
    """places: a number for each answer, of which only the order counts; smaller is better."""
    refuse_media(row, prompt, origin)
    distinct: dict[Any, tuple[float, tuple[Turn, ...]]] = {}
    for place, answer in zip(places, answers, strict=True):
        if distinct.setdefault(_content(answer), (place, answer))[0] != place:
            _incomparable(
                origin, "the same answer is both better and worse; take the row, or one of the two, out"
            )
    if len(distinct) < 2:
        _incomparable(origin, "two different answers are needed for one to be better; take the row out")
    if not any(turn.content.strip() or turn.tool_calls for turn in prompt):
        refuse(origin, "the prompt is empty; write it, or take the row out")
    if row.get("system"):
        prompt = (Turn("system", expect_text(row["system"], '"system"', origin)), *prompt)
    order = sorted(distinct, key=lambda content: distinct[content][0])  # ties stay in the order of the row
    distinct_places = sorted({place for place, _ in distinct.values()})
    return Preference(
        prompt=prompt,
        answers=tuple(distinct[content][1] for content in order),
        ranks=tuple(distinct_places.index(distinct[content][0]) for content in order),
        row_order=tuple(order.index(_content(answer)) for answer in answers),
        condition=read_condition(row, origin),
        margin=_margin(row, len(order), origin),
        tools=read_tools(row, origin),
        weight=read_weight(row, origin),
        origin=origin,
    )


def read_prompt(row: Values, origin: str) -> tuple[Turn, ...] | None:
    """The row's prompt, apart from its answers; None when it has none of the keys."""
    key = next((key for key in _PROMPTS if has(row, key)), None)
    if key is None:
        return None
    value = row[key]
    if key == "instruction":
        return read_question(row, origin)
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


def read_side(value: Any, key: str, prompt: tuple[Turn, ...] | None, origin: str) -> tuple[Turn, ...]:
    """An answer's turns; where there is no prompt, those of the whole conversation. key: the answer's, for messages."""
    if isinstance(value, str):
        turns = _transcript(value) if _TRANSCRIPT.match(value) else ()
        if prompt is not None and not (turns and _content(turns[: len(prompt)]) == _content(prompt)):
            return (Turn("assistant", value),)
        if not turns:
            refuse(origin, f'"{key}" is a text and there is no prompt; write one of {", ".join(_PROMPTS)}')
    else:
        turns = _turns(cast("list[Any]", value) if isinstance(value, list) else [value], origin)
    if prompt is not None and turns and turns[0].role != "assistant":
        if _content(turns[: len(prompt)]) != _content(prompt):
            _incomparable(
                origin, f'"{key}" begins with another prompt than the row has; both must be the same'
            )
        turns = turns[len(prompt) :]
        if turns and turns[0].role != "assistant":
            _incomparable(
                origin, f'"{key}" has a {turns[0].role} turn behind the prompt, where its answer should begin'
            )
    if not turns or turns[-1].role != "assistant":
        refuse(
            origin, f'"{key}" does not end with an answer of the assistant\'s; correct it or take the row out'
        )
    return turns


def _common_prompt(
    chosen: tuple[Turn, ...], rejected: tuple[Turn, ...], origin: str
) -> tuple[tuple[Turn, ...], list[tuple[Turn, ...]]]:
    """The turns that two conversations begin with, and the answer that follows in each."""
    # each side keeps a turn for its answer, even where one conversation begins with all of the other
    longest = min(len(chosen), len(rejected)) - 1
    shared = 0
    while shared < longest and _turn_content(chosen[shared]) == _turn_content(rejected[shared]):
        shared += 1
    if not shared:
        _incomparable(origin, "chosen and rejected share no prompt; they must be answers to the same one")
    answers = [chosen[shared:], rejected[shared:]]
    for answer in answers:
        if answer[0].role != "assistant":
            _incomparable(
                origin,
                f"chosen and rejected part at turn {shared + 1}, which is the {answer[0].role}'s: "
                "they must be answers to the same prompt",
            )
    return chosen[:shared], answers


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


def _incomparable(origin: str, message: str) -> NoReturn:
    raise IncomparableError(f"{origin}: {message}")


def _answer_value(answer: Any) -> Any:
    """The text or messages of an answer; it may be in an object, beside its score."""
    if is_object(answer) and "role" not in answer and "from" not in answer:
        return next((answer[key] for key in ("answer", "response", "content", "text") if key in answer), None)
    return answer


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
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if not _is_number(margin) or margin < 0:
        refuse(origin, f'"margin" is a number of at least 0, not {margin!r}')
    if answers > 2:
        refuse(origin, '"margin" belongs to a pair, and this is a list; leave it out')
    return float(margin)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
