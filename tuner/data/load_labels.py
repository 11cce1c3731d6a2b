"""Answers that are each desirable or not, as KTO trains on them: labeled rows, and the answers of preferences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

import numpy as np

from tuner.config.data import Preferences, Source
from tuner.data.answers import read_condition, read_prompt, read_side
from tuner.data.conversation import Preference, Turn
from tuner.data.data_report import DataReport
from tuner.data.dataset import Dataset, Progress, build
from tuner.data.encoding import Tokenizer
from tuner.data.labels import LabelCollector, Labels
from tuner.data.load_pairs import PolicyBuilder, learned_tokens, remove_suffix
from tuner.data.preference_rows import SHAPES
from tuner.data.row_shapes import Reader, Shape, registered_shapes
from tuner.data.turns import (
    Values,
    expect_text,
    has,
    read_tools,
    read_weight,
    refuse,
    refuse_media,
    untyped,
)


class LabeledAnswer(TypedDict):
    """A row of TRL's unpaired preferences, as tokens; an answer ends with its end-of-turn token."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    completion_learned: np.ndarray
    """bool: whether the loss is taken on a token of the answer, as on those of the assistant's turns."""
    label: bool


def load_labels(
    data: Preferences, tokenizer: Tokenizer, *, progress: Progress | None = None
) -> Dataset[Labels]:
    """The labeled answers of a config's data; from the cache when nothing that decides them has changed.

    The report's notes count both kinds, answers that have both labels, and what is ignored. Raises UserError with
    `file:line` for every kind of bad row.
    """
    parts, report, fingerprint = build(LabelBuilder(data, tokenizer, progress))
    return Dataset(parts["train"], parts.get("validation"), parts.get("test"), report, fingerprint)


def labeled_answers(labels: Labels, suffix: np.ndarray) -> Iterator[LabeledAnswer]:
    """Every answer, in order. suffix: from `answer_suffix`, removed from the end of answers."""
    for index, (start, label) in enumerate(
        zip(labels.starts.tolist(), labels.desirable.tolist(), strict=True)
    ):
        tokens = remove_suffix(labels.sequences.example(index)[0], suffix)
        yield {
            "prompt_ids": tokens[:start],
            "completion_ids": tokens[start:],
            "completion_learned": learned_tokens(labels.sequences, index, start)[start : len(tokens)],
            "label": label,
        }


def _read_labeled(row: Values, origin: str) -> Preference:
    """One answer, and whether it is desirable: a preference of one answer, of rank 0 or 1."""
    if has(row, "completion"):
        prompt = read_prompt(row, origin) or ()
        answer = read_side(row["completion"], "completion", prompt, origin)
    else:
        turns = read_prompt({"prompt": row["messages"]}, origin) or ()
        if not turns or turns[-1].role != "assistant":
            refuse(origin, '"messages" does not end with an answer of the assistant\'s; write it')
        prompt, answer = turns[:-1], turns[-1:]
    refuse_media(row, prompt, origin)
    if not any(turn.content.strip() or turn.tool_calls for turn in prompt):
        refuse(origin, "the prompt is empty; write it, or take the row out")
    if row.get("system"):
        prompt = (Turn("system", expect_text(row["system"], '"system"', origin)), *prompt)
    label = untyped(row["label"])
    if label not in (True, False):
        refuse(origin, f'"label" is true for a desirable answer and false for another, not {label!r:.60}')
    return Preference(
        prompt=prompt,
        answers=(answer,),
        ranks=(0 if label else 1,),
        row_order=(0,),
        condition=read_condition(row, origin),
        tools=read_tools(row, origin),
        weight=read_weight(row, origin),
        origin=origin,
    )


LABELED = {"labeled": Shape(_read_labeled, ("prompt", "completion", "label"), ("messages", "label"))}
"""The shape of rows with a label, which are no preferences: one answer alone is better than none."""


class LabelBuilder(PolicyBuilder[Labels]):
    """Builds labeled answers: those of rank 0 are desirable."""

    purpose = "labels"

    def collector(self) -> LabelCollector:
        return LabelCollector()

    def reader(self, source: Source) -> Reader:
        shape = source.shape if isinstance(source.shape, str) else None
        return Reader(shape, {**registered_shapes("preference"), **LABELED, **SHAPES})

    def finish(self) -> tuple[dict[str, Labels], DataReport]:
        parts, report = super().finish()
        train = parts["train"]
        desirable = int(train.desirable.sum())
        report.notes.append(
            f"{desirable:,} answers to train on are desirable, {len(train) - desirable:,} are not"
        )
        if contradictions := _count_contradictions(train):
            report.notes.append(
                f"{contradictions:,} answers are desirable in one row and undesirable in another: they teach nothing; "
                "keep those of one side"
            )
        return parts, report


def _count_contradictions(labels: Labels) -> int:
    """Number of distinct answers that have both labels."""
    kinds: dict[bytes, set[bool]] = {}
    for index, desirable in enumerate(labels.desirable.tolist()):
        kinds.setdefault(labels.sequences.example(index)[0].tobytes(), set()).add(desirable)
    return sum(len(found) > 1 for found in kinds.values())
