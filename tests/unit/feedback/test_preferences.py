"""Labels as the rows that a reward model is trained on."""

from collections import Counter
from pathlib import Path
from typing import Any

from tests.unit.feedback.conftest import candidates, row
from tuner.data.preference_rows import preference_reader
from tuner.feedback.preferences import preference_rows
from tuner.feedback.store import Label


def label(annotator: str, item: int, choice: Any, swapped: bool = False, policy: Any = "random") -> Label:
    return Label(0, annotator, f"item{item}", swapped, policy, choice, "", 4.0, 0.0)


def test_rows_by_hand() -> None:
    pairs = candidates(
        row(1, condition="brief"),
        row(2),
        row(3, weight=2.0),
        row(4),
        row(5),
        row(6, gold=0),
        row(7),
        row(8, answers=["", "text"]),
    )
    labels = [
        label("ann", 1, "left", swapped=True),
        *(label(name, 2, "tie") for name in ("ann", "bob")),
        *(label(name, 3, "left") for name in ("ann", "bob")),
        label("cai", 3, "right"),
        *(label("ann", 4, "left"), label("bob", 4, "right")),
        *(label("ann", 5, "left"), label("ann", 5, "right", policy="repeat")),  # a repeat decides nothing
        label("ann", 6, "left"),
        label("ann", 7, "unsure"),
        label("ann", 8, "left"),
    ]
    rows, left_out = preference_rows(labels, pairs)
    assert rows == [
        {
            "id": "item1",
            "prompt": "Question 1?",
            "condition": "brief",
            "chosen": "late 1",
            "rejected": "early 1",
            "weight": 1.0,
        },
        {
            "id": "item3",
            "prompt": "Question 3?",
            "chosen": "early 3",
            "rejected": "late 3",
            "weight": 2.0 * 2 / 3,
        },
        {"id": "item5", "prompt": "Question 5?", "chosen": "early 5", "rejected": "late 5", "weight": 1.0},
    ]
    reasons = ("ties", "contested", "planted", "without a decision", "with an empty better answer")
    assert left_out == Counter(reasons)


def test_a_reward_model_reads_them(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "2?"},
    ]
    pairs = candidates(row(1, condition="brief", prompt=turns, system="Be kind."))
    (values,), _ = preference_rows([label("ann", 1, "right")], pairs)
    reader = preference_reader(None)
    preference = reader.shape_of(values, "out.jsonl:1").read(values, "out.jsonl:1")
    assert preference.prompt == pairs["item1"].prompt
    assert [answer[0].content for answer in preference.answers] == ["late 1", "early 1"]
    assert (preference.condition, preference.weight) == ("brief", 1.0)
