"""Rows of rollouts.jsonl: the answers of a policy in training, written by its run and read by every other command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tuner.data.conversation import Conversation, Prompt, Turn
from tuner.data.turns import (
    Values,
    expect_list,
    expect_mapping,
    expect_text,
    message_of,
    read_tools,
    read_turn,
)

KEYS = ("prompt", "answer", "prompt_number")
"""By which such a row is recognized."""


def rollout_row(
    prompt: Prompt,
    answer: str,
    *,
    number: int,
    score: float,
    gold: float | None,
    ended: bool,
    scores: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The JSON values of an answer. A key without a value is null, but for `policy_system`, `tools`, `gold` and
    `scores`, which most runs lack.

    number: of the prompt among the training prompts, from 0. gold: None without a rule. scores: by each reward model of
    an ensemble, standardized; None without one.
    """
    asked = prompt.policy_input()
    optional = {
        # Apart from the prompt: reward models do not read it, and `tuner score` gives the score of the rollout.
        "policy_system": None if len(asked.turns) == len(prompt.turns) else asked.turns[0].content,
        "tools": list(prompt.tools) or None,
        "gold": gold,
        "scores": None if scores is None else list(scores),
    }
    return {
        "prompt": [message_of(turn) for turn in prompt.turns],
        "answer": answer,
        "condition": prompt.condition,
        "reference": prompt.reference,
        "score": score,
        "ended": ended,
        "prompt_number": number,
        "origin": prompt.origin,
        **{key: value for key, value in optional.items() if value is not None},
    }


def read_rollout(row: Values, origin: str) -> Conversation:
    """The conversation that the reward model scored: the prompt's turns and the answer, without `policy_system`."""
    turns = [_turn(message, origin) for message in expect_list(row["prompt"], '"prompt"', origin)]
    answer = Turn("assistant", expect_text(row["answer"], '"answer"', origin))
    return Conversation((*turns, answer), read_tools(row, origin), origin=origin)


def _turn(message: Any, origin: str) -> Turn:
    turn, written = read_turn(message, origin), expect_mapping(message, "a message", origin).get("input")
    # Alpaca's template shows it apart from the rest of the turn, and a reward model may have been trained with that.
    return turn if written is None else replace(turn, input=expect_text(written, '"input"', origin))
