"""Nothing that a run folder names is executed without the user's word, and no command writes over what it reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import tuner
from tests.equivalence.conftest import SMALL
from tuner.cli.score import score
from tuner.config import from_json, override
from tuner.errors import UserError
from tuner.stages.data_view import training_texts
from tuner.stages.evaluate_run import evaluate_run
from tuner.stages.trust import code_named_by

EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").touch()


def score(answer, reference):
    return 0.25


def shape(row):
    return row
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    changes = {"max_steps": 1, "data.limit": 20, "data.split": {"test": 0.2}}
    return tuner.train(override(SMALL, changes), runs=folder).folder


@pytest.fixture
def stranger(finished: Path, tmp_path: Path) -> Path:
    """A run folder that somebody else has sent, with a file beside it that leaves a trace where it is run."""
    folder = Path(shutil.copytree(finished, tmp_path / "stranger"))
    (folder / "evil.py").write_text(EVIL)
    return folder


def name(folder: Path, **changes: Any) -> None:
    """Change leaves of a run's config."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    for path, value in changes.items():
        part, _, leaf = path.partition("__")
        values[part][leaf] = value
    file.write_text(json.dumps(values))


def test_a_function_runs_on_the_users_word_alone(stranger: Path) -> None:
    name(stranger, evaluation__score=f"{stranger}/evil.py:score")
    with pytest.raises(UserError, match=r"its config names code to run \(.*evil\.py:score\).*add --trust"):
        evaluate_run(stranger)
    assert not (stranger / "ran").exists()
    assert evaluate_run(stranger, trust=True).results["score"] == 0.25
    assert (stranger / "ran").exists()


def test_trust_is_not_inherited(stranger: Path) -> None:
    name(stranger, model__trust_remote_code=True)
    with pytest.raises(UserError, match=r"model\.trust_remote_code=true.*add --trust"):
        evaluate_run(stranger)
    with pytest.raises(UserError, match=r"model\.trust_remote_code=true.*add --trust, or --text FILE"):
        training_texts(str(stranger))


def test_merging_runs_no_row_shape(stranger: Path) -> None:
    shaped = {"path": "tuner:sums/train.jsonl", "shape": f"{stranger}/evil.py:shape"}
    name(stranger, data__files=[shaped])
    with pytest.raises(UserError, match=r"evil\.py:shape\).*add --trust, or --text FILE to compare on"):
        training_texts(str(stranger))
    assert not (stranger / "ran").exists()
    name(stranger, data__files=["tuner:sums/train.jsonl"], evaluation__score=f"{stranger}/evil.py:score")
    assert training_texts(str(stranger))  # its rows need no code
    assert not (stranger / "ran").exists()


def test_every_field_that_may_run_code_is_listed() -> None:
    file = Path(__file__)
    grpo = {
        "stage": "grpo",
        "policy": {"path": "a", "trust_remote_code": True},
        "reward": {"function": f"{file}:reward"},
        "prompts": {
            "files": [{"path": "p.jsonl", "shape": f"{file}:shape"}],
            "test_files": ["t"],
            "template": "internlm2",
        },
        "evaluation": {"rule": f"{file}:rule"},
    }
    names = code_named_by(from_json(json.dumps(grpo)))
    assert names == [
        *(f"{file}:{one}" for one in ("reward", "shape", "rule")),
        "policy.trust_remote_code=true",
    ]


def test_rows_are_not_scored_over_themselves(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(score)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    (tmp_path / "link.jsonl").symlink_to(rows)
    for file, output in (("rows", "rows"), ("rows", "link"), ("r*", "rows")):
        arguments = ["none", str(tmp_path / f"{file}.jsonl"), "-o", str(tmp_path / f"{output}.jsonl")]
        error = CliRunner().invoke(app, arguments).exception
        assert isinstance(error, UserError)
        assert "this is the file that is scored" in str(error)
    assert rows.read_text() == "{}\n"
