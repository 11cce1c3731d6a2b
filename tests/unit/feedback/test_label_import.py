"""Exports of Argilla and Label Studio, as their own code writes them (argilla 1.29 and 2.8, label-studio-sdk 2.1)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.unit.feedback.conftest import candidates, row
from tuner.errors import UserError
from tuner.feedback.candidates import Candidate
from tuner.feedback.label_import import Import, import_labels
from tuner.feedback.store import LabelStore

ANN, BOB = "00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"
PAIRS = candidates(*map(row, (1, 2, 3)))


def task(number: int, *annotations: dict[str, Any], swapped: bool = False, **data: Any) -> dict[str, Any]:
    """A task of Label Studio's export JSON; swapped: whether the second answer stood on the left."""
    texts = (f"late {number}", f"early {number}") if swapped else (f"early {number}", f"late {number}")
    return {
        "id": 70 + number,
        "annotations": list(annotations),
        "data": {"prompt": f"Question {number}?", "left": texts[0], "right": texts[1], **data},
        "meta": {},
        "predictions": [{"result": [selected("right")], "model_version": "m"}],
    }


def selected(side: str) -> dict[str, Any]:
    return {
        "value": {"selected": side},
        "id": "x",
        "from_name": "better",
        "to_name": "left,right",
        "type": "pairwise",
        "origin": "manual",
    }


def annotation(*results: dict[str, Any], by: Any = 3, **values: Any) -> dict[str, Any]:
    return {
        "id": 11,
        "completed_by": by,
        "result": list(results),
        "was_cancelled": False,
        "lead_time": 4.5,
        **values,
    }


def record(number: int, responses: Any, metadata: Any = None, **values: Any) -> dict[str, Any]:
    """A record as `to_json` of Argilla 2 writes it."""
    fields = {"prompt": f"Question {number}?", "left": f"early {number}", "right": f"late {number}"}
    return {
        "id": f"uuid-{number}",
        "fields": fields,
        "metadata": metadata or {},
        "suggestions": {"better": {"value": "right", "score": None, "agent": "m"}},
        "responses": responses,
        "vectors": {},
        "status": "pending",
        "_server_id": None,
        **values,
    }


def write(folder: Path, rows: list[dict[str, Any]], name: str = "export.json") -> Path:
    file = folder / name
    lines = "".join(json.dumps(values) + "\n" for values in rows)
    file.write_text(lines if name.endswith("l") else json.dumps(rows, indent=1))
    return file


def load(
    folder: Path,
    store: LabelStore,
    *rows: dict[str, Any],
    pairs: dict[str, Candidate] = PAIRS,
    name: str = "export.json",
) -> Import:
    return import_labels(write(folder, list(rows), name), pairs, store)


def labels(store: LabelStore) -> dict[tuple[str, str], str]:
    return {(label.annotator, label.item): label.verdict for label in store.labels()}


def test_label_studio(store: LabelStore, tmp_path: Path) -> None:
    bob = {"id": 4, "email": "bob@example.org"}
    tie = {"value": {"choices": ["tie"]}, "from_name": "tie", "type": "choices"}
    comment = {"value": {"text": ["too long"]}, "from_name": "comment", "type": "textarea"}
    done = load(
        tmp_path,
        store,
        task(1, annotation(comment, selected("left")), annotation(selected("right"), by=bob), swapped=True),
        task(2, annotation(tie), annotation(was_cancelled=True, by=bob)),
        task(3),
    )
    assert labels(store) == {
        ("label-studio:3", "item1"): "second",
        ("label-studio:bob@example.org", "item1"): "first",
        ("label-studio:3", "item2"): "tie",
        ("label-studio:bob@example.org", "item2"): "skip",
    }
    first = store.labels()[0]
    assert (first.comment, first.seconds, first.policy) == ("too long", 4.5, "import")
    assert (done.stored, done.without_response) == (4, 1)
    assert "4 labels of 2 annotators stored" in done.sentences()[0]


def test_label_studio_minimal(store: LabelStore, tmp_path: Path) -> None:
    common = {"annotation_id": 11, "created_at": "2026-01-01T00:00:00Z", "lead_time": 4.5}
    texts = {"id": 7, "prompt": "Question 1?", "left": "late 1", "right": "early 1"}
    load(
        tmp_path,
        store,
        {**texts, "better": [{"selected": "left"}], "comment": "good one", "annotator": 3, **common},
        {**texts, "tie": "tie", "annotator": "bob@example.org", **common},
        {**texts, "better": "left", "annotator": "choices", **common},
    )
    assert labels(store) == {
        ("label-studio:3", "item1"): "second",
        ("label-studio:bob@example.org", "item1"): "tie",
        ("label-studio:choices", "item1"): "second",
    }


def test_an_answer_that_is_a_word_for_a_side_is_no_choice(store: LabelStore, tmp_path: Path) -> None:
    pairs = candidates(row(5, answers=["left", "north"]))
    values = {"prompt": "Question 5?", "left": "left", "right": "north", "better": "right"}
    load(tmp_path, store, {**values, "annotator": 3, "annotation_id": 1}, pairs=pairs)
    assert labels(store) == {("label-studio:3", "item5"): "second"}


def test_a_rating_is_no_verdict(store: LabelStore, tmp_path: Path) -> None:
    def answer(value: Any) -> list[dict[str, Any]]:
        return [{"value": value, "user_id": ANN, "status": "submitted"}]

    done = load(
        tmp_path,
        store,
        record(1, {"quality": answer(1), "better": answer("right")}),
        record(2, {"quality": answer(2)}),
        name="export.jsonl",
    )
    assert labels(store) == {(f"argilla:{ANN}", "item1"): "second"}
    assert done.unreadable == [f"{tmp_path / 'export.jsonl'}:2: [2] of argilla:{ANN}"]


def test_values_that_say_different_things_are_no_label(store: LabelStore, tmp_path: Path) -> None:
    tie = {"value": {"choices": ["tie"]}, "from_name": "tie", "type": "choices"}
    same = {"value": {"choices": ["left"]}, "from_name": "more", "type": "choices"}
    done = load(
        tmp_path,
        store,
        task(1, annotation(selected("left"), tie)),
        task(2, annotation(selected("left"), same)),
        name="export.jsonl",
    )
    assert labels(store) == {("label-studio:3", "item2"): "first"}
    assert done.unreadable == [f"{tmp_path / 'export.jsonl'}:1: ['left', 'tie'] of label-studio:3"]


def test_argilla_2_nested_counts_what_was_submitted_for_certain(store: LabelStore, tmp_path: Path) -> None:
    """A completed record has a submitted response: which one, is certain where there is only one."""
    mine, other = {"value": "right", "user_id": BOB}, {"value": "left", "user_id": ANN}
    comment = [{"value": "too long", "user_id": BOB}]
    done = load(
        tmp_path,
        store,
        record(1, {"better": [mine], "comment": comment}, {"candidate": "item1"}, status="completed"),
        record(2, {"better": [mine, other]}, status="completed"),
        record(3, {"better": [mine]}),
        record(4, {}),
    )
    assert labels(store) == {(f"argilla:{BOB}", "item1"): "second"}
    assert [label.comment for label in store.labels()] == ["too long"]
    assert done.unknown == 3
    assert "3 responses were left out that may be drafts" in done.sentences()[1]


def test_argilla_2_flat_knows_drafts(store: LabelStore, tmp_path: Path) -> None:
    done = load(
        tmp_path,
        store,
        {
            "id": "uuid",
            "status": "pending",
            "_server_id": None,
            "prompt": "Question 1?",
            "left": "early 1",
            "right": "late 1",
            "candidate": "item1",
            "better.responses": ["left", "right", None],
            "better.responses.users": [ANN, BOB, "3"],
            "better.responses.status": ["submitted", "draft", "discarded"],
            "better.suggestion": "right",
        },
    )
    assert labels(store) == {(f"argilla:{ANN}", "item1"): "first", ("argilla:3", "item1"): "skip"}
    assert done.drafts == 1


def test_argilla_1_records_and_rankings(store: LabelStore, tmp_path: Path) -> None:
    def response(user: str, *ranks: int, status: str = "submitted") -> dict[str, Any]:
        options = [
            {"value": option, "rank": rank}
            for option, rank in zip(("response1", "response2"), ranks, strict=False)
        ]
        values = {"preference": {"value": options}} if ranks else {}
        return {"user_id": user, "values": values, "status": status}

    fields = {"prompt": "Question 1?", "response1": "late 1", "response2": "early 1"}
    load(
        tmp_path,
        store,
        {
            "fields": fields,
            "metadata": {},
            "responses": [
                response(ANN, 1, 2),
                response(BOB, 1, 1),
                response("3", 2, 1, status="draft"),
                response("4", status="discarded"),
            ],
            "suggestions": [],
            "external_id": "item1",
        },
    )
    assert labels(store) == {
        (f"argilla:{ANN}", "item1"): "second",
        (f"argilla:{BOB}", "item1"): "tie",
        ("argilla:4", "item1"): "skip",
    }


def test_argilla_1_as_datasets_rows(store: LabelStore, tmp_path: Path) -> None:
    question = [
        {"user_id": ANN, "value": {"rank": [2, 1], "value": ["left", "right"]}, "status": "submitted"}
    ]
    values = {
        "prompt": "Question 1?",
        "left": "early 1",
        "right": "late 1",
        "preference": question,
        "preference-suggestion": None,
        "external_id": None,
        "metadata": json.dumps({"candidate": "item1"}),
    }
    load(tmp_path, store, values, name="export.jsonl")
    assert labels(store) == {(f"argilla:{ANN}", "item1"): "second"}


def test_twice_is_once_and_other_labels_do_not_replace(store: LabelStore, tmp_path: Path) -> None:
    one = task(1, annotation(selected("left")))
    load(tmp_path, store, one)
    again = load(tmp_path, store, one)
    assert (again.stored, again.already, again.changed) == (0, 1, 0)
    other = load(tmp_path, store, task(1, annotation(selected("right"))))
    assert (other.stored, other.already, other.changed) == (0, 0, 1)
    assert "1 labels differ" in other.sentences()[1]
    assert labels(store) == {("label-studio:3", "item1"): "first"}


def test_what_matches_no_candidate_is_counted_with_its_line(store: LabelStore, tmp_path: Path) -> None:
    left = annotation(selected("left"))
    done = load(
        tmp_path,
        store,
        task(1, left),
        task(8, left),
        task(3, left, candidate="item2"),
        task(2, annotation(selected("none"))),
        name="export.jsonl",
    )
    assert labels(store) == {("label-studio:3", "item1"): "first"}
    file = tmp_path / "export.jsonl"
    assert done.unmatched == [
        f"{file}:2: its texts are no candidate's",
        f"{file}:3: its texts are not those of candidate 'item2'",
    ]
    assert "2 rows match no candidate" in done.sentences()[1]
    assert done.unreadable == [f"{file}:4: ['none'] of label-studio:3"]
    with pytest.raises(UserError, match="none of its labels is of a candidate"):
        load(tmp_path, store, task(9, left))


def test_equal_answers_are_told_apart_by_the_id_or_the_prompt(store: LabelStore, tmp_path: Path) -> None:
    answers = ["Yes.", "No."]
    pairs = candidates(
        *(row(number, answers=answers) for number in (5, 6)), row(7, prompt="Question 6?", answers=answers)
    )
    texts = {"left": "Yes.", "right": "No."}
    left = annotation(selected("left"))
    done = load(
        tmp_path,
        store,
        task(0, left, **texts, prompt="Question 5?"),
        task(0, left, **texts, prompt="Question 6?"),
        task(0, left, **texts, candidate="item7", prompt=""),
        pairs=pairs,
    )
    assert {item for _, item in labels(store)} == {"item5", "item7"}
    assert len(done.unmatched) == 1
    assert "fits several candidates" in done.unmatched[0]


def test_white_space_may_change_unless_it_is_all_that_differs(store: LabelStore, tmp_path: Path) -> None:
    pairs = candidates(row(5, answers=["a\nb ", "c"]), row(6, answers=["x y", "x\ny"]))
    done = load(
        tmp_path,
        store,
        task(0, annotation(selected("right")), left="c", right=" a  b"),
        task(0, annotation(selected("right")), left="x y", right="x\ny"),
        pairs=pairs,
    )
    assert labels(store) == {("label-studio:3", "item5"): "first"}
    assert len(done.unmatched) == 1


def test_all_or_none_of_a_file_is_stored(store: LabelStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"export\.jsonl:2: a row with name is none of Argilla's"):
        load(tmp_path, store, task(1, annotation(selected("left"))), {"name": "x"}, name="export.jsonl")
    assert store.labels() == []
    for name in ("absent.json", "table.csv"):
        (tmp_path / "table.csv").write_text("a,b\n1,2\n")
        with pytest.raises(UserError, match="name an export of Argilla or Label Studio"):
            import_labels(tmp_path / name, PAIRS, store)


@pytest.mark.parametrize(
    "damage",
    [
        {"annotations": [None, 3, {"result": [None, {"value": 3}, {"value": {"selected": {}}}]}]},
        {"annotations": [{"completed_by": None, "result": "x", "lead_time": "long"}]},
        {"annotations": [{"completed_by": {}, "result": [{"value": {"selected": "left"}}], "lead_time": -1}]},
    ],
)
def test_odd_values_are_no_traceback(store: LabelStore, tmp_path: Path, damage: dict[str, Any]) -> None:
    load(tmp_path, store, {**task(1), **damage})
    nested = [
        {"fields": {}, "responses": value} for value in (3, "x", [3], {"q": 3}, {"q": [3]}, [{"values": 3}])
    ]
    load(tmp_path, store, *nested, task(2, annotation(selected("left"))))
    assert ("label-studio:3", "item2") in labels(store)


def test_the_tasks_that_the_documentation_writes_come_back(
    store: LabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "labeling.md").read_text(encoding="utf-8")
    (block,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "tasks.json" in block
    )
    rows = [row(number) for number in range(11, 31)]
    monkeypatch.chdir(tmp_path)
    Path("candidates.jsonl").write_text("".join(json.dumps(values) + "\n" for values in rows))
    exec(compile(block, "labeling.md", "exec"), {})
    tasks = json.loads(Path("tasks.json").read_text())
    for task in tasks:  # someone who likes late answers
        side = "left" if task["data"]["left"].startswith("late") else "right"
        task["annotations"] = [annotation(selected(side))]
    load(tmp_path, store, *tasks, pairs=candidates(*rows))
    assert len({task["data"]["left"].split()[0] for task in tasks}) == 2  # the order is random
    assert set(labels(store).values()) == {"second"}
    assert len(store.labels()) == 20
