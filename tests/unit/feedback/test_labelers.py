"""Programs and people in one store: what a rule decides, what waits for people, and who outranks whom."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tests.unit.feedback.conftest import candidates, row
from tuner.config.feedback_config import Feedback, Judge, People, RuleFeedback, is_machine_name
from tuner.errors import UserError
from tuner.feedback.agreement import figures, report
from tuner.feedback.labelers import WaitingPairs, labeler_of, waiting_for_people
from tuner.feedback.preferences import preference_rows
from tuner.feedback.queue import Queue
from tuner.feedback.store import LabelStore

RULES = """
def length(answer, row):
    return len(answer)

def wanted(answer, row):
    return row["wanted"] in answer and row["condition"] == "brief"

def breaks(answer, row):
    return 1 / 0 if "3" in answer else len(answer)

def nan(answer, row):
    return float("nan")

def no_row(answer):
    return 1.0
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rules.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rule(function: str, **values: Any) -> RuleFeedback:
    return RuleFeedback(function=f"rules.py:{function}", **values)


def by_annotator(store: LabelStore) -> dict[str, dict[str, str | None]]:
    labels: dict[str, dict[str, str | None]] = {}
    for label in store.labels():
        labels.setdefault(label.annotator, {})[label.item] = label.decision
    return labels


# rules


@pytest.mark.usefixtures("rules")
def test_a_rule_prefers_the_higher_score(store: LabelStore) -> None:
    pairs = candidates(row(1), row(2), row(4, answers=["short", "longer"]), row(5, answers=["ab", "cd"]))
    advanced: list[int] = []
    done = labeler_of(rule("length")).label(pairs, store, advanced.append)
    assert by_annotator(store) == {
        "rule:length": {"item1": "first", "item2": "first", "item4": "second", "item5": "tie"}
    }
    assert done.figures == {"pairs": 4, "decided": 3, "ties": 1}
    assert done.sentences == ("rule:length: 3 of 4 pairs decided, 1 ties",)
    assert sum(advanced) == 4
    again = labeler_of(rule("length")).label(pairs, store, advanced.append)
    assert again == done
    assert sum(advanced) == len(store.labels()) == 4


@pytest.mark.usefixtures("rules")
def test_a_rule_sees_the_row_and_has_a_name(store: LabelStore) -> None:
    pairs = candidates(row(6, wanted="late", condition="brief"), row(7, wanted="early", condition="brief"))
    labeler_of(rule("wanted", name="mine")).label(pairs, store)
    assert by_annotator(store) == {"rule:mine": {"item6": "second", "item7": "first"}}


@pytest.mark.usefixtures("rules")
def test_a_rule_that_fails_names_the_row_and_keeps_the_rest(store: LabelStore) -> None:
    pairs = candidates(*map(row, (1, 2, 3)))
    with pytest.raises(
        UserError, match=r"candidates\.jsonl:3: .*rules\.py:breaks.* failed on 'early 3' \(ZeroDiv"
    ):
        labeler_of(rule("breaks")).label(pairs, store)
    assert set(by_annotator(store)["rule:breaks"]) == {"item1", "item2"}
    with pytest.raises(UserError, match=r"candidates\.jsonl:1: .* returned nan for 'early 1'"):
        labeler_of(rule("nan")).label(pairs, store)


@pytest.mark.usefixtures("rules")
def test_rules_that_cannot_be_called_are_refused_at_once() -> None:
    for name, message in (
        ("no_row", "called with an answer and its row"),
        ("absent", "no function 'absent'"),
    ):
        with pytest.raises(UserError, match=message):
            labeler_of(rule(name))


# people


def test_what_waits_for_people(store: LabelStore) -> None:
    pairs = candidates(*map(row, (1, 2, 3)), row(4, gold=0))
    store.add(pairs.values())
    two = People(overlap=2)
    assert waiting_for_people(two, pairs, store) == WaitingPairs(pairs=3, labels=6, contested=0)
    for item in ("item1", "item2", "item3"):
        store.record("judge:m", item, "first")
    assert waiting_for_people(two, pairs, store).labels == 6
    for annotator, item, choice in (
        ("ann", "item1", "left"),
        ("bob", "item1", "right"),
        ("ann", "item2", "skip"),
        ("ann", "item3", "unsure"),
        ("bob", "item3", "tie"),
    ):
        store.submit(annotator, store.show(annotator, item, "random", False).id, choice)  # type: ignore[arg-type]
    waiting = waiting_for_people(two, pairs, store)
    assert waiting == WaitingPairs(pairs=1, labels=1, contested=1)
    assert "1 pairs wait for 1 labels by people: run `tuner label runs/x`" in waiting.sentences("runs/x")[0]
    assert "1 pairs are contested" in waiting.sentences("runs/x")[1]
    assert WaitingPairs(0, 0, 0).sentences("runs/x") == ()


def test_whoever_skips_everything_does_not_hold_a_round_for_ever(store: LabelStore) -> None:
    pairs = candidates(*map(row, (1, 2, 3)))
    queue = Queue(store, pairs)
    while showing := queue.next("ann"):
        store.submit("ann", showing.id, "skip")
    assert waiting_for_people(People(), pairs, store).pairs == 0


# programs beside people


def test_a_recorded_label_by_hand(store: LabelStore) -> None:
    assert store.record("judge:m", "item1", "second", "why")
    assert not store.record("judge:m", "item1", "first")
    assert store.record("rule:r", "item1", "tie")
    (label, other) = store.labels()
    assert (label.annotator, label.item, label.decision, label.comment) == (
        "judge:m",
        "item1",
        "second",
        "why",
    )
    assert label.by_machine
    assert not label.on_page
    assert other.decision == "tie"
    store.record("argilla:1", "item2", "skip", policy="import", seconds=3.0)
    imported = store.labels()[-1]
    assert (imported.choice, imported.by_machine, imported.on_page) == ("skip", False, False)


def test_a_program_takes_no_pair_from_people(store: LabelStore) -> None:
    pairs = candidates(*map(row, (1, 2, 3)))
    queue = Queue(store, pairs, repeats=0)
    for item in pairs:
        store.record("judge:m", item, "first")
    assert queue.remaining("ann") == 3
    shown = queue.next("ann")
    assert shown is not None
    store.submit("ann", shown.id, "right" if not shown.swapped else "left")  # against the judge
    assert queue.remaining("bob") == 2  # which contests nothing


def test_sides_and_seconds_are_of_the_page_alone(store: LabelStore, clock: Any) -> None:
    pairs = candidates(*map(row, (1, 2, 3)))
    for item in pairs:
        store.record("judge:m", item, "first")
        store.record("argilla:1", item, "first", policy="import", seconds=99.0)
    assert math.isnan(figures(store.labels(), pairs).left)
    for item, choice in (("item1", "left"), ("item2", "right")):
        showing = store.show("ann", item, "random", True)
        clock.now += 5
        store.submit("ann", showing.id, choice)  # type: ignore[arg-type]
    everyone = report(store.labels(), pairs)["groups"][0]
    assert (everyone["labels"], everyone["left"], everyone["median_seconds"]) == (8, 0.5, 5.0)
    kappas = {tuple(pair["annotators"]): pair["items"] for pair in report(store.labels(), pairs)["pairs"]}
    assert kappas["ann", "judge:m"] == 2


def test_people_outrank_programs(store: LabelStore) -> None:
    pairs = candidates(*map(row, (1, 2, 3, 4)))
    store.add(pairs.values())
    for item in pairs:
        store.record("judge:a", item, "first")
        store.record("judge:b", item, "first")
    for annotator, item, verdict in (
        ("ann", "item1", "second"),
        ("ann", "item2", "unsure"),
        ("ann", "item3", "first"),
        ("bob", "item3", "second"),
    ):
        store.record(annotator, item, verdict, policy="import")  # type: ignore[arg-type]
    rows, left_out = preference_rows(store.labels(), pairs)
    assert [(values["id"], values["chosen"], values["weight"]) for values in rows] == [
        ("item1", "late 1", 1.0),
        ("item2", "early 2", 1.0),  # no person decided
        ("item4", "early 4", 1.0),
    ]
    assert left_out == Counter(["contested"])  # programs settle no disagreement of people


# the config


def test_feedback_is_read_from_values_and_json() -> None:
    adapter = TypeAdapter(tuple[Feedback, ...])
    judge = Judge(url="https://api.example.org/v1/", model="m")
    feedback = adapter.validate_python(({"kind": "people", "overlap": 2}, judge, "rules.py:marker"))
    assert feedback == (People(overlap=2), judge, RuleFeedback(function="rules.py:marker"))
    assert judge.url == "https://api.example.org/v1"
    assert [part.annotator for part in feedback if not isinstance(part, People)] == ["judge:m", "rule:marker"]
    assert adapter.validate_json(adapter.dump_json(feedback)) == feedback


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("url", "http://user:sk-123@host/v1", "neither a user nor a query"),
        ("url", "https://host/v1?key=sk-123", "neither a user nor a query"),
        ("url", "sk-123", "is no address"),
        ("url", "file:///sk-123", "is no address"),
        ("url", "http://host:99999/v1", "is no address"),
        ("api_key_env", "sk-123", "is the name of an environment variable"),
        ("options", {"messages": []}, "messages cannot be set here"),
    ],
)
def test_judges_that_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as error:
        Judge(**{"url": "http://host/v1", "model": "m", field: value})
    if field == "api_key_env" or "@" in str(value) or "?" in str(value):
        assert "sk-123" not in str(error.value)


def test_names_of_programs_are_no_persons() -> None:
    assert all(map(is_machine_name, ("judge:m", " Rule:x", "JUDGE :m")))
    assert not any(map(is_machine_name, ("ann", "judge", "judges:x", "argilla:1", "a rule:b")))
