"""Rounds: what each leaves, and that killed anywhere, they go on as if nothing had happened."""

from __future__ import annotations

import json
import pkgutil
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import tuner
from tests.equivalence.conftest import TRAIN, in_two_processes
from tests.equivalence.test_ppo import assert_close
from tests.equivalence.test_resume import Killed
from tests.equivalence.test_run_models import contents, unfinished
from tests.equivalence.test_same_result import assert_close as assert_close_reward
from tests.unit.training.test_wandb_tracker import records
from tuner.feedback.store import LabelStore
from tuner.stages.run import Run
from tuner.training.wandb_tracker import run_id


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
    return tuner.train(cool({"merge": True}), runs=tmp_path_factory.mktemp("whole"))


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
def killed(cool, cool_sft: Run, cool_reward: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The two rounds, killed in every part, logged to W&B; the runs that they start from have not finished."""
    runs = tmp_path_factory.mktemp("killed")
    starts = {
        "policy": unfinished(cool_sft, runs / "sft"),
        "reward": unfinished(cool_reward, runs / "reward"),
    }
    paths = {f"policy.{name}.path": str(folder) for name, folder in starts.items()}
    config = cool({"tracking": {"mode": "offline", "tags": ["mine"]}, **paths})
    for target, call in PLACES.values():
        with pytest.MonkeyPatch.context() as patched:
            kill_at(patched, target, call)
            with pytest.raises(Killed):
                tuner.train(config, runs=runs)
    return tuner.train(config, runs=runs)


def test_killed_in_every_part_after_unfinished_runs(whole: Run, killed: Run) -> None:
    """As never killed, and after finished ones: policies, scores of candidates, cards and averages of the patch."""
    assert without_places(left_behind(killed)) == without_places(left_behind(whole))


def test_killed_in_the_merge_a_run_goes_on_with_it(cool, whole: Run) -> None:
    folder, merged = whole.folder, contents(whole.folder / "merged")
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "merged")
    with pytest.MonkeyPatch.context() as patched:
        kill_at(patched, "tuner.models.merge.write_companions", 1)
        with pytest.raises(Killed):
            tuner.train(cool({"merge": True}), runs=folder.parent)
    assert not (folder / "merged").exists()
    tuner.train(cool({"merge": True}), runs=folder.parent)
    assert contents(folder / "merged") == merged


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


def test_the_whole_run_has_a_row_for_each_round(killed: Run) -> None:
    """In W&B, in the group of its parts, under one id: after a round, and after the last."""
    files = sorted(killed.folder.glob("wandb/offline-run-*/*.wandb"))
    runs = [grouped(records(file))["run"][0] for file in files]
    assert {(run.run_group, run.job_type, run.run_id) for run in runs} == {
        ("cool", "rounds", run_id(killed.folder))
    }
    assert [logged_steps(file) for file in (files[0], files[-1])] == [[1], [1, 2]]
    table = json.loads(
        next(killed.folder.glob("wandb/*/files/media/table/report/rounds_2*.json")).read_text()
    )
    shown = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    for line, results in zip(shown, (killed.results or {})["rounds"], strict=True):
        assert [line[name] for name in ("step", "gold", "kl")] == [
            results["round"],
            results["gold"]["after"],
            results["kl"],
        ]
    assert shown[1]["patch_labels"] > 0 == (shown[0]["patch_labels"] is not None)


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
