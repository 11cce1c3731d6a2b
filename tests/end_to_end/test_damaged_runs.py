"""A run folder may be damaged anywhere: what comes of it is a sentence, or the run that it was; never a traceback."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import tuner
from tests.equivalence.conftest import SMALL
from tuner.config import override
from tuner.errors import UserError
from tuner.models.chat import open_chat
from tuner.stages.run import Run
from tuner.training.checkpoint import Checkpoints, explain_write

CONFIG = override(SMALL, {"name": "run", "max_steps": 3, "checkpoint.every": 1, "data.limit": 60})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that was killed before it had a model."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.stages.context.Context.finish", lambda *_, **__: None)
        tuner.train(CONFIG, runs=folder.parent)
    return folder


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Run:
    return Run(shutil.copytree(sound, tmp_path / "run"))


def resumed(run: Run) -> str:
    """The error of going on, or "" where the run came to its end as it would have."""
    try:
        tuner.train(CONFIG, runs=run.folder.parent)
    except UserError as error:
        return str(error)
    assert run.model_folder.is_dir()
    assert len(run.metrics) == 3
    return ""


# What is tolerated, and said


@pytest.mark.parametrize(
    "line", [b'{"st', b"\0" * 64, b"\xff\xfe", b"[1]", b"null", b'{"step": "2"}', b"[" * 99_999]
)
def test_a_damaged_line_of_metrics_is_removed_and_said(run: Run, line: bytes) -> None:
    file = run.folder / "metrics.jsonl"
    first, rest = file.read_bytes().split(b"\n", 1)
    file.write_bytes(b"\n".join((first, line, rest)))
    assert [record["step"] for record in run.metrics] == [1, 2, 3]
    assert resumed(run) == ""
    assert "metrics.jsonl: 1 damaged lines are removed" in (run.folder / "log.txt").read_text()
    assert len(file.read_bytes().split(b"\n")) == 4


def test_what_stands_beside_the_checkpoints_is_left_alone(run: Run) -> None:
    for name in ("step_abc", "step_000002.bak", "step_"):
        (run.checkpoints_folder / name).mkdir()
    (run.checkpoints_folder / "step_000009").write_text("a plain file")
    assert resumed(run) == ""
    assert (run.checkpoints_folder / "step_abc").is_dir()


def test_results_without_a_model_are_no_end(run: Run) -> None:
    (run.folder / "results.json").write_text("{}")
    assert resumed(run) == ""
    assert "there are results, but no model of them" in (run.folder / "log.txt").read_text()
    assert run.results


def test_a_lost_measure_before_training_is_said(run: Run) -> None:
    (run.folder / "before.json").unlink()
    assert resumed(run) == ""
    assert "before.json is gone" in (run.folder / "log.txt").read_text()


# What is refused in a sentence


@pytest.mark.parametrize("name", ["config", "data", "base", "versions", "before", "results"])
@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"\xff\xfe\x00", b"[]", b'{"fingerprint": 3}'])
def test_a_damaged_json_file_is_named(run: Run, name: str, content: bytes) -> None:
    (run.folder / f"{name}.json").write_bytes(content)
    said = resumed(run)
    if content.startswith(b"{") and name in ("versions", "before", "results"):
        assert said == ""  # nothing is bound by it
    elif content.startswith(b"{") and name != "config":
        assert f"the {name} changed since this run began (was 3, is" in said
    else:
        assert said.startswith(str(run.folder))
        assert (
            f"{name}.json" in said
            or "this config is not valid JSON" in said
            or "this JSON is no config" in said
        )


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "config.json", ".lock", "data.json"])
def test_a_folder_where_a_file_belongs_is_named(run: Run, name: str) -> None:
    (run.folder / name).unlink(missing_ok=True)
    (run.folder / name).mkdir()
    assert name in resumed(run)


@pytest.mark.parametrize("name", ["checkpoints", "model", "checkpoints/.writing-step_000003"])
def test_a_file_where_a_folder_belongs_is_named(run: Run, name: str) -> None:
    shutil.rmtree(run.folder / name, ignore_errors=True)
    shutil.rmtree(run.checkpoints_folder / "step_000003", ignore_errors=True)
    (run.folder / name).write_text("not a folder")
    said = resumed(run)
    assert f"{Path(name).name}: cannot be read or written" in said or said == ""
    assert said or "writing" in name


# Any damage


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content) + 1)])


def zero(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content) + 1)
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes(content)


def fill(path: Path, chance: random.Random) -> None:
    path.write_bytes(
        chance.choice([b"", b"{}", b"[]", b"null", b"3", b'"a"', chance.randbytes(50), b"{" * 5_000])
    )


def remove(path: Path, chance: random.Random) -> None:
    path.unlink()


def swap(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip, flip, cut, zero, fill, remove, swap)


def read(run: Run) -> None:
    assert all(isinstance(record["step"], int) for record in (*run.metrics, *run.samples))
    assert run.results is None or isinstance(run.results, dict)
    _ = run.config, run.is_finished
    Checkpoints(run.checkpoints_folder, keep=1).load_newest(skip_damaged=True)


def begin(run: Run) -> None:
    try:
        run.start(CONFIG, (), {"processes": 1})
        run.pin("data", "0")
    finally:
        run.release()


def talk(run: Run) -> None:
    open_chat(str(run.folder))


def go_on(run: Run) -> None:
    tuner.train(CONFIG, runs=run.folder.parent)


def test_no_damage_ends_in_a_traceback(sound: Path, tmp_path: Path) -> None:
    finished = Path(shutil.copytree(sound, tmp_path / "finished" / "run"))
    tuner.train(CONFIG, runs=finished.parent)
    chance, counts = random.Random(0), Counter[str]()
    for number in range(240):
        # most are cheap; loading a model and training it are not
        act = talk if number % 10 == 3 else go_on if number % 20 == 7 else chance.choice((read, begin))
        folder = tmp_path / "bad" / "run"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(finished if act is talk else sound, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "curves" not in path.name)
        if act is talk:
            files = [path for path in files if path.parent.name == "model"]
        damaged, damage = chance.choice(files), chance.choice(DAMAGES)
        damage(damaged, chance)
        try:
            act(Run(folder))
            counts["as it was"] += 1
        except Exception as error:
            # what cannot be written is worded by `train`, which `begin` is a part of
            if not isinstance(explain_write(error, folder), UserError):
                pytest.fail(f"{number}: {act.__name__} after {damage.__name__} of {damaged.name}: {error!r}")
            counts["said"] += 1
    assert counts["said"] > 40
    assert counts["as it was"] > 40


def test_a_json_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from tuner.training.json_lines import replace_text

    events: list[str] = []
    sync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append("sync") or sync(number))
    monkeypatch.setattr(Path, "replace", lambda self, target: events.append("rename") or rename(self, target))
    replace_text(tmp_path / "a.json", json.dumps({"a": 1}))
    assert events == ["sync", "rename"]
