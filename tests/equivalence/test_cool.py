"""Rounds: what each leaves, and that killed anywhere, they go on as if nothing had happened."""

from __future__ import annotations

import json
import pkgutil
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import tuner
from tests.equivalence.conftest import SMALL_PPO, SMALL_REWARD, TRAIN, in_two_processes
from tests.equivalence.test_ppo import assert_close
from tests.equivalence.test_resume import Killed
from tests.equivalence.test_run_models import contents, unfinished
from tests.equivalence.test_same_result import assert_close as assert_close_reward
from tests.unit.training.test_wandb_tracker import records
from tuner.cli.main import app
from tuner.config import COOL, Candidates, Patch, Round, override
from tuner.errors import UserError
from tuner.feedback.store import LabelStore
from tuner.stages.end_run import end_run
from tuner.stages.run import Run
from tuner.stages.run_models import usable_path
from tuner.training.lock import FolderLock
from tuner.training.wandb_tracker import run_id

TEST_FILES = [{"path": "tuner:twins/test.jsonl", "limit": 8}]
PROMPTS = [{"path": "tuner:sums/train.jsonl", "condition": "brief", "limit": 30}]
TEST_PROMPTS = [{"path": "tuner:sums/test.jsonl", "condition": "brief", "limit": 6}]


def shorter(answer: str, row: dict[str, Any]) -> float:
    return -len(answer)


@pytest.fixture(scope="module")
def reward(start) -> Run:
    """The run of the first reward model, with the checkpoint of its last step."""
    return start("reward", {"max_steps": 4, "data.test_files": TEST_FILES, "checkpoint.every": 4})


@pytest.fixture(scope="module")
def cool(reward: Run) -> Callable[..., COOL]:
    """Two rounds on the embedded model, some leaves changed."""

    def small(changes: dict[str, Any] | None = None) -> COOL:
        config = COOL(
            name="cool",
            reward=override(
                SMALL_REWARD, {"data.test_files": TEST_FILES, "data.max_length": 96, "tokens_per_pass": 192}
            ),
            policy=override(
                SMALL_PPO,
                {
                    "policy.path": "tuner:tiny",
                    "adapter": {"r": 8, "alpha": 16},
                    "reward.path": str(reward.folder),
                    "prompts.files": PROMPTS,
                    "prompts.test_files": TEST_PROMPTS,
                    "replay": None,
                    "evaluation.rule": f"{__file__}:is_sum",
                    "tokens_per_pass": 64,
                },
            ),
            rounds=(
                Round(steps=3),
                Round(steps=2, patch=Patch(steps=3, max_accuracy_loss=1, min_margin=None, average=(0.5,))),
            ),
            candidates=Candidates(prompts=8, slow=16, fast=10),
            feedback=(f"{__file__}:shorter",),  # type: ignore[arg-type]
            merge=False,
        )
        return override(config, {"checkpoint.every": 1} | (changes or {}))

    return small


def is_sum(answer: str, row: dict[str, Any]) -> float:
    return float("=" in answer)


def left_behind(run: Run) -> dict[str, Any]:
    """All that a run of rounds leaves, without times."""
    results = json.loads((run.folder / "results.json").read_text())
    for place in results["rounds"]:
        for group in (place["labels"] or {}).get("groups", ()):
            group.pop("median_seconds")
    left: dict[str, Any] = {"results": results, "model": contents(run.model_folder)}
    for number in (1, 2):
        folder = run.folder / f"round_{number}"
        for part in ("reward", "ppo"):
            if (folder / part).is_dir():
                left[f"{number} {part}"] = contents(folder / part / "model")
        for file in sorted(folder.glob("candidates/*.json*")):
            left[f"{number} {file.name}"] = file.read_text()
        if (folder / "feedback").is_dir():
            left[f"{number} labels"] = stored_labels(folder)
    return left


def stored_labels(folder: Path) -> list[tuple[str, str, str]]:
    """Of a round: item, label and annotator."""
    labels = LabelStore(folder / "feedback" / "labels.sqlite").labels()
    return [(label.item, label.choice, label.annotator) for label in labels]


@pytest.fixture(scope="module")
def whole(cool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two rounds that nothing interrupts."""
    return tuner.train(cool(), runs=tmp_path_factory.mktemp("whole"))


def test_two_rounds(whole: Run) -> None:
    first, second = left_behind(whole)["results"]["rounds"]
    assert first["patch"] is None
    assert second["patch"]["labels"] > 0
    assert [record["step"] for record in whole.metrics] == [1, 2, 3, 4, 5]
    average = json.loads((whole.folder / "round_2/reward/average_0.5/reward.json").read_text())
    assert average["reference"]["standard_deviation"] > 0, "without it, no part of an ensemble"


UNTIL_THE_SECOND_POLICY = f"""
import sys
from tuner.stages.cool import loop

def train_first(config, context, place, *models, train=loop.train_policy):
    if place.number == 2:
        sys.exit()
    return train(config, context, place, *models)

loop.train_policy = train_first
{TRAIN}"""
"""What each of two processes does: from the first policy to the patch, with its cards and average."""


def test_two_processes_label_and_patch_as_one(cool, whole: Run, tmp_path: Path) -> None:
    """After a policy of a single process."""
    folder = tmp_path / "two" / "case" / "cool"
    shutil.copytree(whole.folder / "round_1/ppo", folder / "round_1/ppo")
    in_two_processes(tmp_path, {"case": cool()}, UNTIL_THE_SECOND_POLICY)
    assert_patched_alike(whole.folder, folder)


def test_two_processes_equal_one_over_two_rounds(cool, whole: Run, tmp_path: Path) -> None:
    in_two_processes(tmp_path, {"case": cool()})
    folder = tmp_path / "two" / "case" / "cool"
    assert_patched_alike(whole.folder, folder)
    for part in ("round_1/ppo", "round_2/ppo"):
        assert_close(Run(whole.folder / part), Run(folder / part))
    assert_alike(whole.results, Run(folder).results)


def assert_patched_alike(one: Path, two: Path) -> None:
    """The same candidates and labels; scores, cards and weights as far as Adam carries a rounding on."""
    rows = [(run / "round_1/candidates/candidates.jsonl").read_text().splitlines() for run in (one, two)]
    assert_alike(*(list(map(json.loads, lines)) for lines in rows))
    assert stored_labels(one / "round_1") == stored_labels(two / "round_1") != []
    patched = [Run(run / "round_2/reward") for run in (one, two)]
    assert patched[1].read_json("versions")["processes"] == 2  # type: ignore[index]
    assert_close_reward(*patched)
    assert_alike(*(run.read_json("patch") for run in patched))
    averages = [load_file(run.folder / "average_0.5/adapter_model.safetensors") for run in patched]
    for name, tensor in averages[0].items():
        assert (tensor - averages[1][name]).norm() <= 2e-3 * tensor.norm(), name


def assert_alike(one: Any, two: Any, place: str = "") -> None:
    """Plain values that are the same, but for the folder of their runs, and numbers that a rounding moved."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), place
        for name, value in one.items():
            assert_alike(value, two[name], f"{place}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(two), place
        for index, values in enumerate(zip(one, two, strict=True)):
            assert_alike(*values, f"{place}/{index}")
    elif isinstance(one, float) and not place.endswith("median_seconds"):
        assert one == pytest.approx(two, rel=2e-3, abs=1e-4), place
    elif place.endswith("/model"):
        assert (one is None, Path(str(one)).name) == (two is None, Path(str(two)).name)
    elif not place.endswith("median_seconds"):
        assert one == two, place


PLACES = {
    "in the first policy": ("tuner.training.step.Step.finish", 2),
    "between its answers": ("tuner.stages.cool.candidates.answer", 3),
    "while candidates are written": ("tuner.stages.cool.candidates.json.dumps", 3),
    "between two labels": ("tuner.feedback.store.LabelStore.record", 2),
    "in the patch": ("tuner.training.step.Step.finish", 2),
    "after the patch": ("tuner.stages.cool.patch.patch_card", 2),
    "at the end": ("tuner.stages.cool.finish.replace_text", 1),
}
"""What a kill comes in, in the order of a run: a function, and the number of its call since the last kill."""


@pytest.fixture(scope="module")
def killed(cool, reward: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The two rounds, killed in every part, logged to W&B; the run of the first reward model has not finished."""
    runs = tmp_path_factory.mktemp("killed")
    first = unfinished(reward, runs / "reward")
    config = cool({"tracking": {"mode": "offline", "tags": ["mine"]}, "policy.reward.path": str(first)})
    for target, call in PLACES.values():
        with pytest.MonkeyPatch.context() as patched:
            kill_at(patched, target, call)
            with pytest.raises(Killed):
                tuner.train(config, runs=runs)
    return tuner.train(config, runs=runs)


def test_killed_in_every_part_after_an_unfinished_reward_model(whole: Run, killed: Run) -> None:
    """As never killed, and after the finished one: policies, scores of candidates, cards and averages of the patch."""
    assert without_places(left_behind(killed)) == without_places(left_behind(whole))


def test_the_runs_of_rounds_are_jobs_of_one_group(killed: Run) -> None:
    """In W&B; each goes on under its id, and has the panels of its stage."""
    panels = {"ppo": {"ppo", "critic", "time"}, "reward": {"train", "eval", "data"}}
    for part, num_starts in (("round_1/ppo", 2), ("round_2/reward", 2), ("round_2/ppo", 1)):
        name, stage = part.replace("/", "."), part.rpartition("/")[2]
        files = sorted((killed.folder / part).glob("wandb/offline-run-*/*.wandb"))
        assert len(files) == num_starts
        for file in files:
            written = grouped(records(file))
            run = written["run"][0]
            assert (run.run_group, run.job_type, run.display_name) == ("cool", name, f"cool.{name}")
            assert list(run.tags) == ["mine", stage]
            assert run.run_id == run_id(killed.folder / part)
            globs = {metric.glob_name for metric in written["metric"]}
            assert {f"{panel}/*" for panel in panels[stage]} <= globs
        steps = [step for file in files for step in logged_steps(file)]
        assert sorted(set(steps)) == [record["step"] for record in Run(killed.folder / part).metrics]


def grouped(written: list[Any]) -> dict[str, list[Any]]:
    """Kind -> W&B's records of it."""
    kinds: dict[str, list[Any]] = {}
    for record in written:
        kind = record.WhichOneof("record_type")
        kinds.setdefault(kind, []).append(getattr(record, kind))
    return kinds


def logged_steps(file: Path) -> list[int]:
    rows = grouped(records(file)).get("history", [])
    items = [item for row in rows for item in row.item]
    return [json.loads(item.value_json) for item in items if "step" in (item.key, *item.nested_key)]


def kill_at(patched: pytest.MonkeyPatch, target: str, call: int) -> None:
    """Raise Killed in place of this call of a function."""
    calls = iter(range(1, call + 1))
    module, _, name = target.rpartition(".")
    owner: Any = pkgutil.resolve_name(module)
    function = getattr(owner, name)

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return function(*arguments, **options)

    patched.setattr(owner, name, killed)


def without_places(left: dict[str, Any]) -> str:
    """As JSON text, of each path only its end below the folder that runs are in."""
    return re.sub(r'/[^"]*?/((cool/|reward")[^"]*)', r"\1", json.dumps(left, default=str))


STRICT = {"rounds.1.patch.max_accuracy_loss": 0.0, "rounds.1.patch.min_margin": 1.0}
PEOPLE = {"feedback": [{"kind": "people", "overlap": 2}]}
GOING_ON = {"feedback": [{"kind": "people", "overlap": 2, "wait": False}]}


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


def test_people_are_waited_for(cool, waiting: dict[str, Path], tmp_path: Path) -> None:
    """Two annotators at odds decide nothing, and a third settles it."""
    config = cool(PEOPLE)
    wait_for_people(config, waiting, tmp_path)
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
    patch = second["patch"]
    held_out = sum(group["rows"] for group in patch["before"]["patterns"].values())
    assert patch["labels"] + held_out == 1
    assert patch["left_out"] == len(items) - 1


def test_labels_that_come_late_are_used_by_the_next_round(
    cool, waiting: dict[str, Path], tmp_path: Path
) -> None:
    wait_for_people(cool(PEOPLE), waiting, tmp_path)
    run = tuner.train(cool(GOING_ON), runs=tmp_path)
    log = (run.folder / "log.txt").read_text()
    assert "no pair of an earlier round has a label that decides it" in log
    assert not (run.folder / "round_2" / "reward").exists()
    store = LabelStore(run.folder / "round_1" / "feedback" / "labels.sqlite")
    items = label_all(store, "ann", "first")
    rounds = [*cool(GOING_ON).model_dump(mode="json")["rounds"], {"steps": 1, "start": "continue"}]
    rounds[2]["patch"] = {"steps": 2, "max_accuracy_loss": 1.0, "min_margin": None, "average": [0.5]}
    longer = tuner.train(cool(GOING_ON | {"rounds": rounds}), runs=tmp_path)
    last = longer.results["rounds"][2]  # type: ignore[index]
    assert last["patch"]["labels"] > 0
    assert last["patch"]["left_out"] + last["patch"]["labels"] >= len(items) - 3
    assert list(last["patch"]["averages"]) == ["0.5"]
    policy = Run(longer.folder / "round_3" / "ppo").config
    assert policy.policy.path == str(longer.folder / "round_2" / "ppo")  # type: ignore[attr-defined]
    assert policy.reference.path == "tuner:tiny"  # type: ignore[attr-defined]


def test_a_patch_that_costs_too_much_is_refused_or_rolled_back(
    cool, waiting: dict[str, Path], tmp_path: Path
) -> None:
    wait_for_people(cool(PEOPLE), waiting, tmp_path)
    label_all(LabelStore(tmp_path / "cool" / "round_1" / "feedback" / "labels.sqlite"), "ann", "first")
    with pytest.raises(UserError, match=r"the patch is refused: .*falls from .* below min_margin=1 of it"):
        tuner.train(cool(GOING_ON | STRICT), runs=tmp_path)
    rolled_back = GOING_ON | STRICT | {"rounds.1.patch.on_loss": "roll_back"}
    run = tuner.train(cool(rolled_back), runs=tmp_path)
    second = run.results["rounds"][1]  # type: ignore[index]
    assert second["patch"]["model"] is None
    assert "the patch is not taken" in (run.folder / "log.txt").read_text()
    policy = Run(run.folder / "round_2" / "ppo").config
    assert policy.reward.path == second["patch"]["from"]  # type: ignore[attr-defined]


def test_an_unfinished_run_is_the_model_of_its_last_policy(
    cool, waiting: dict[str, Path], tmp_path: Path
) -> None:
    wait_for_people(cool(PEOPLE), waiting, tmp_path)
    said: list[str] = []
    path = usable_path(str(tmp_path / "cool"), say=said.append)
    assert path == str(tmp_path / "cool" / "round_1" / "ppo")
    assert "has not finished; its model is that of" in said[0]
    with pytest.raises(UserError, match="none of the runs in it is in training now"):
        end_run(tmp_path / "cool", trust=True)


def test_stop_ends_the_run_that_is_in_training_and_the_rounds_go_on(
    cool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = cool(PEOPLE), tmp_path / "cool"
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
