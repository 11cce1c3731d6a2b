"""Rounds whose pairs people label, and that a further reward model scores: late, at odds, and ended early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tuner
from tests.equivalence.conftest import COOL_TEST_FILES
from tests.equivalence.test_cool import kill_at
from tests.equivalence.test_resume import Killed
from tuner.cli.main import app
from tuner.config import COOL, override
from tuner.errors import UserError
from tuner.feedback.store import LabelStore
from tuner.stages.end_run import end_run
from tuner.stages.run import Run
from tuner.stages.run_models import usable_path
from tuner.training.lock import FolderLock

STRICT = {"rounds.1.patch.max_accuracy_loss": 0.0, "rounds.1.patch.min_margin": 1.0}
GOING_ON = {"feedback.0.wait": False}


@pytest.fixture(scope="module")
def with_people(cool, start) -> Callable[..., COOL]:
    """The same with labels by people, and with a further reward model, which no round patches."""
    further = start("reward", {"max_steps": 2, "data.test_files": COOL_TEST_FILES, "seed": 1})
    ensemble = {
        "further_rewards": [{"path": str(further.folder)}],
        "normalize_rewards": False,
        "reward_clip": None,
    }
    people = cool(
        {"feedback": [{"kind": "people", "overlap": 2}]}
        | {f"policy.{name}": value for name, value in ensemble.items()}
    )
    return lambda changes=None: override(people, changes or {})


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where a run of one round stands that waits for people, once a test has trained it."""
    return {"runs": tmp_path_factory.mktemp("waiting")}


def wait_for_people(config: COOL, waiting: dict[str, Path], runs: Path) -> None:
    """Put a copy of the waiting run into a folder."""
    folder = waiting["runs"] / "cool"
    if not folder.exists():
        with pytest.raises(UserError):
            tuner.train(config, runs=waiting["runs"])
    shutil.copytree(folder, runs / "cool")


def label_all(store: LabelStore, annotator: str, verdict: str) -> list[str]:
    """Label every pair of a round alike."""
    items = [row[0] for row in store._database.execute("SELECT id FROM items ORDER BY id")]
    for item in items:
        store.record(annotator, item, verdict, policy="import")  # type: ignore[arg-type]
    return items


def test_people_are_waited_for(with_people, waiting: dict[str, Path], tmp_path: Path) -> None:
    """Two annotators at odds decide nothing, and a third settles it."""
    wait_for_people(with_people(), waiting, tmp_path)
    # the one label that is decided is not to be held out
    config = with_people({"rounds.1.patch.held_out": 0.0})
    sentence = rf"pairs wait for \d+ labels by people: run `tuner label {tmp_path}/cool`"
    with pytest.raises(UserError, match=sentence):
        tuner.train(config, runs=tmp_path)
    store = LabelStore(tmp_path / "cool" / "round_1" / "feedback" / "labels.sqlite")
    items = label_all(store, "ann", "first")
    label_all(store, "ben", "second")
    store.record("cai", items[0], "second", policy="import")
    run = tuner.train(config, runs=tmp_path)
    first, second = run.results["rounds"]  # type: ignore[index]
    assert {group["annotator"] for group in first["labels"]["groups"]} >= {"ann", "ben", "cai"}
    assert second["patch"]["labels"] == 1
    assert second["patch"]["left_out"] == len(items) - 1


def test_labels_that_come_late_are_used_by_the_next_round(
    with_people, cool_sft: Run, waiting: dict[str, Path], tmp_path: Path
) -> None:
    wait_for_people(with_people(), waiting, tmp_path)
    run = tuner.train(with_people(GOING_ON), runs=tmp_path)
    log = (run.folder / "log.txt").read_text()
    assert "no pair of an earlier round has a label that decides it" in log
    assert not (run.folder / "round_2" / "reward").exists()
    store = LabelStore(run.folder / "round_1" / "feedback" / "labels.sqlite")
    items = label_all(store, "ann", "first")
    rounds = [*with_people(GOING_ON).model_dump(mode="json")["rounds"], {"steps": 1, "start": "continue"}]
    rounds[2]["patch"] = {"steps": 2, "max_accuracy_loss": 1.0, "min_margin": None, "average": [0.5]}
    longer = tuner.train(with_people(GOING_ON | {"rounds": rounds}), runs=tmp_path)
    last = longer.results["rounds"][2]  # type: ignore[index]
    assert last["patch"]["labels"] > 0
    assert last["patch"]["left_out"] + last["patch"]["labels"] >= len(items) - 3
    assert list(last["patch"]["averages"]) == ["0.5"]
    policy = Run(longer.folder / "round_3" / "ppo").config
    assert_an_ensemble_of_which_one_is_patched(longer.folder)
    assert policy.policy.path == str(longer.folder / "round_2" / "ppo")  # type: ignore[attr-defined]
    assert policy.reference.path == str(cool_sft.folder)  # type: ignore[attr-defined]


def assert_an_ensemble_of_which_one_is_patched(folder: Path) -> None:
    """Both reward models score the answers of rollouts and candidates."""
    first, last = (Run(folder / f"round_{number}/ppo") for number in (1, 3))
    assert first.config.further_rewards == last.config.further_rewards  # type: ignore[attr-defined]
    assert first.config.reward != last.config.reward  # type: ignore[attr-defined]
    for run in (first, last):
        assert {len(row["scores"]) for rows in run.answers.values() for row in rows} == {2}
        assert all(record["disagreement"] > 0 for record in run.metrics)
    candidates = (folder / "round_1/candidates/candidates.jsonl").read_text().splitlines()
    assert {len(json.loads(row)["scores"]) for row in candidates} == {2}


def test_a_costly_patch_is_refused_or_rolled_back(
    with_people, waiting: dict[str, Path], tmp_path: Path
) -> None:
    wait_for_people(with_people(), waiting, tmp_path)
    label_all(LabelStore(tmp_path / "cool" / "round_1" / "feedback" / "labels.sqlite"), "ann", "first")
    with pytest.raises(UserError, match=r"the patch is refused: .*falls from .* below min_margin=1 of it"):
        tuner.train(with_people(GOING_ON | STRICT), runs=tmp_path)
    rolled_back = GOING_ON | STRICT | {"rounds.1.patch.on_loss": "roll_back"}
    run = tuner.train(with_people(rolled_back), runs=tmp_path)
    second = run.results["rounds"][1]  # type: ignore[index]
    assert second["patch"]["model"] is None
    assert "the patch is not taken" in (run.folder / "log.txt").read_text()
    policy = Run(run.folder / "round_2" / "ppo").config
    assert policy.reward.path == second["patch"]["from"]  # type: ignore[attr-defined]


def test_an_unfinished_run_is_the_model_of_its_last_policy(
    with_people, waiting: dict[str, Path], tmp_path: Path
) -> None:
    wait_for_people(with_people(), waiting, tmp_path)
    said: list[str] = []
    path = usable_path(str(tmp_path / "cool"), say=said.append)
    assert path == str(tmp_path / "cool" / "round_1" / "ppo")
    assert "has not finished; its model is that of" in said[0]
    with pytest.raises(UserError, match="none of the runs in it is in training now"):
        end_run(tmp_path / "cool", trust=True)


def test_stop_ends_the_run_that_is_in_training_and_the_rounds_go_on(
    with_people, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = with_people(), tmp_path / "cool"
    with monkeypatch.context() as patched:
        kill_at(patched, "tuner.training.step.Step.finish", 3)
        with pytest.raises(Killed):
            tuner.train(config, runs=tmp_path)
    lock = FolderLock(folder)
    lock.acquire()
    asked = CliRunner().invoke(app, ["train", "--stop", str(folder)])
    lock.release()
    assert asked.stdout.startswith(f"{folder}/round_1/ppo: asked to end")
    assert f"goes on with what follows it in {folder}" in asked.stdout
    ended = CliRunner().invoke(app, ["train", "--stop", str(folder), "--trust"])
    assert ended.exit_code == 0, ended.output
    assert f"{folder}/round_1/ppo has ended; `tuner train` with the config of {folder}" in ended.stdout
    with pytest.raises(UserError, match="wait for"):
        tuner.train(config, runs=tmp_path)
    assert (Run(folder / "round_1" / "ppo").results or {})["ended_early"] == {"step": 2, "of": 3}
