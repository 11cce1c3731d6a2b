"""`tuner label RUN`: the rounds of a run, labels of other tools, and names that are no person's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.conftest import ROOT
from tests.unit.feedback.conftest import row
from tuner.cli.label import label
from tuner.data.preference_rows import preference_reader
from tuner.errors import UserError
from tuner.feedback.candidates import read_candidates
from tuner.feedback.round_folders import people_of
from tuner.feedback.store import LabelStore

app = typer.Typer()
app.command()(label)


def run(*arguments: object) -> str:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).output


def write_round(run_folder: Path, number: int, *rows: dict[str, Any]) -> Path:
    """A round's folder with candidates; returns them."""
    file = run_folder / f"round_{number}" / "candidates" / "candidates.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return file


def record(run_folder: Path, number: int, annotator: str, **verdicts: Any) -> None:
    folder = run_folder / f"round_{number}"
    (folder / "feedback").mkdir(exist_ok=True)
    store = LabelStore(folder / "feedback" / "labels.sqlite")
    store.add(read_candidates(folder / "candidates" / "candidates.jsonl").values())
    for item, verdict in verdicts.items():
        store.record(annotator, item, verdict, policy="machine" if ":" in annotator else "import")
    store.close()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose second round has candidates, and whose third has none yet."""
    folder = tmp_path / "runs" / "cool"
    write_round(folder, 1, row(1), row(2))
    write_round(folder, 2, row(1), row(3), row(4))
    (folder / "round_3").mkdir()
    (folder / "round_10_old").mkdir()
    feedback = [
        {"kind": "judge", "url": "http://localhost/v1", "model": "m"},
        {"kind": "people", "overlap": 2, "repeats": 0.0},
    ]
    (folder / "config.json").write_text(json.dumps({"stage": "cool", "feedback": feedback}))
    return folder


def test_the_newest_round_is_labeled_as_the_run_says(run_folder: Path) -> None:
    command = [sys.executable, "-m", "tuner", "label", str(run_folder), "--name", "ann", "--port", "0"]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    process.kill()
    process.communicate()
    assert lines[0] == f"round 2: {run_folder}/round_2/candidates/candidates.jsonl\n"
    assert re.match(r"3 pairs; open http://127\.0\.0\.1:\d+/\?token=", lines[1])
    assert f"stored in {run_folder}/round_2/feedback/labels.sqlite" in lines[2]


def test_how_people_label_is_the_runs(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (people_of(run_folder).overlap, people_of(run_folder).repeats) == (2, 0.0)
    assert people_of(run_folder / "round_1") == people_of(run_folder)
    monkeypatch.chdir(run_folder / "round_1")
    assert people_of(Path(".")).overlap == 2
    assert people_of(run_folder / "round_2" / "candidates" / "candidates.jsonl").overlap == 1
    (run_folder / "config.json").write_text('{"feedback": [{"kind": "people", "overlap": 0}]}')
    with pytest.raises(UserError, match=r"config\.json: its feedback by people cannot be read"):
        people_of(run_folder)
    (run_folder / "config.json").write_text('{"feedback": "none"}')
    assert people_of(run_folder).overlap == 1


def test_the_report_is_by_round(run_folder: Path) -> None:
    record(run_folder, 1, "ann", item1="first", item2="tie")
    record(run_folder, 1, "judge:m", item1="first", item2="tie")
    report = json.loads(run(run_folder, "--report", "--json"))
    rounds = report["rounds"]
    assert [(values["round"], values["candidates"], values["preferences"]) for values in rounds] == [
        (1, 2, 1),
        (2, 3, 0),
    ]
    assert rounds[0]["pairs"][0] == {
        "condition": None,
        "annotators": ["ann", "judge:m"],
        "items": 2,
        "kappa": 1.0,
    }
    text = run(run_folder, "--report")
    assert text.index("round 1") < text.index("2 candidates: 1 preferences") < text.index("round 2")
    assert "kappa of ann and judge:m: 1.00 (2 pairs)" in text
    only = json.loads(run(run_folder / "round_1", "--report", "--json"))
    assert only == rounds[0]
    assert not (run_folder / "round_2" / "feedback").exists()  # who reports writes nothing


def test_the_export_has_all_rounds(run_folder: Path, tmp_path: Path) -> None:
    record(run_folder, 1, "judge:m", item1="first", item2="first")
    record(run_folder, 1, "ann", item1="second")
    record(run_folder, 2, "rule:r", item1="second", item4="tie")
    output = tmp_path / "out.jsonl"
    said = run(run_folder, "--export", output)
    rows = list(map(json.loads, output.read_text().splitlines()))
    assert [(values["round"], values["id"], values["chosen"]) for values in rows] == [
        (1, "item1", "late 1"),
        (1, "item2", "early 2"),
        (2, "item1", "late 1"),
    ]
    assert "3 preferences" in said
    assert "1 ties" in said
    preference = preference_reader(None).shape_of(rows[0], "out.jsonl:1").read(rows[0], "out.jsonl:1")
    assert preference.answers[0][0].content == "late 1"


def test_rounds_without_a_pair_are_left_out(run_folder: Path, tmp_path: Path) -> None:
    """Policies that gave the same answers leave no candidates; the run goes on."""
    (run_folder / "round_1" / "candidates" / "candidates.jsonl").write_text("")
    record(run_folder, 2, "rule:r", item1="second")
    report = json.loads(run(run_folder, "--report", "--json"))
    assert [values["round"] for values in report["rounds"]] == [2]
    assert "1 preferences" in run(run_folder, "--export", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="no candidates"):
        run(run_folder / "round_1", "--report")


def test_labels_of_other_tools_are_imported_into_a_round(run_folder: Path, tmp_path: Path) -> None:
    def exported(name: str, number: int) -> Path:
        data = {"prompt": "", "left": f"early {number}", "right": f"late {number}"}
        result = [{"type": "pairwise", "value": {"selected": "left"}}]
        file = tmp_path / name
        file.write_text(
            json.dumps([{"id": 1, "data": data, "annotations": [{"completed_by": 3, "result": result}]}])
        )
        return file

    first, second = exported("a.json", 3), exported("b.json", 4)
    said = run(run_folder, "--import", first, "--import", second)
    assert said.count("1 labels of 1 annotators stored, 0 stood already") == 2
    said = run(run_folder, "--import", first, "--report")
    assert "0 labels of 1 annotators stored, 1 stood already" in said
    assert "label-studio:3" in said
    report = json.loads(run(run_folder, "--report", "--json"))
    assert [values["preferences"] for values in report["rounds"]] == [0, 2]
    with pytest.raises(UserError, match="none of its labels is of a candidate"):
        run(run_folder / "round_1", "--import", first)


def test_mistakes(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "empty"], "no round with candidates"),
        ([run_folder / "round_3"], "no round with candidates"),
        ([run_folder, "--store", tmp_path / "own.sqlite", "--report"], "this run has several rounds"),
        ([run_folder, "--name", "judge:m"], "those of judges and rules"),
        ([run_folder, "--name", " Rule:x"], "those of judges and rules"),
        ([run_folder, "--import", tmp_path / "none.json"], "name an export of Argilla or Label Studio"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments)
