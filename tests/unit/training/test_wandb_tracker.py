"""The W&B door, offline: what it writes is read back from the .wandb file."""

import json
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tuner.config import SFT, Chat, Model, Wandb
from tuner.errors import UserError
from tuner.training.wandb_tracker import WandbTracker, charted, has_key, run_id
from tuner.training.watchers import Sample

BLOCK = 32_768


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def _config(**tracking: Any) -> SFT:
    return SFT(
        name="tiny_run",
        model=Model(path="tuner:tiny"),
        data=Chat(files=("rows.jsonl",)),
        tracking=Wandb(project="shelf", group="first", tags=("a", "b"), notes="why", **tracking),
    )


def _record(step: int, **more: float | None) -> dict[str, Any]:
    return {"step": step, "tokens": 100 * step, "loss": 3.0 / step, "lr": 1e-3, "fill": 0.99,
            "tokens_per_second": 5000.0, "bad_steps": 0, **more}  # fmt: skip


def _track(folder: Path, config: SFT, steps: range, outcome: str = "finished") -> None:
    """What the loop does: at an evaluation the samples come before the record of their step."""
    folder.mkdir(exist_ok=True)
    assert config.tracking is not None
    tracker = WandbTracker(config.tracking)
    tracker.begin(folder, config, steps.start - 1, 10)
    for step in steps:
        if step % 3 == 0:
            tracker.samples(step, [Sample("2+2?", "5", "4", 0.0), Sample("1+1?", "2", "2", 1.0)])
            tracker.step(_record(step, eval_loss=2.0 / step, eval_tokens=64))
        else:
            tracker.step(_record(step, loss=None if step == 2 else 3.0 / step, reward=0.5))
    tracker.message("something happened")
    tracker.end(outcome)  # type: ignore[arg-type]


def records(file: Path, seconds: float = 20.0) -> list[Any]:
    """The records of a .wandb file, once its last is there: W&B writes it a moment after finish returns."""
    deadline = time.monotonic() + seconds
    while True:
        found = _records_so_far(file)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline, f"{file} never got its exit record"
        time.sleep(0.05)


def _records_so_far(file: Path) -> list[Any]:
    """Protobuf messages in a LevelDB log: blocks of 32 KiB, parts with headers of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, found, pending = (
        file.read_bytes(),
        7,
        [],
        b"",
    )  # the file has 7 bytes of its own before the log
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # a header never crosses a block
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        pending += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = Record()
            record.ParseFromString(pending)
            found.append(record)
            pending = b""
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def _history(file: Path) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records(file) if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows
    ]


def _only(file: Path, kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records(file) if record.WhichOneof("record_type") == kind]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after step 5 and went on from a checkpoint after step 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", "/nowhere")
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        folder = tmp_path_factory.mktemp("runs") / "tiny_run"
        _track(folder, _config(x_axis="tokens"), range(1, 6), "interrupted")
        _track(folder, _config(x_axis="tokens"), range(4, 8))
    return folder


def test_every_step_is_one_row_with_its_numbers_grouped(tracked: Path) -> None:
    rows = _history(_files(tracked)[0])
    assert [row["step"] for row in rows] == [row["_step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["train/loss"] == 3.0
    assert rows[0]["train/reward"] == 0.5
    assert rows[0]["data/fill"] == 0.99
    assert rows[0]["system/tokens_per_second"] == 5000.0
    assert rows[2]["eval/loss"] == pytest.approx(2 / 3)
    assert rows[2]["eval/tokens"] == 64
    assert "train/loss" not in rows[1], "a skipped step has no loss"


def test_samples_are_a_table_in_the_row_of_their_step(tracked: Path) -> None:
    file = _files(tracked)[0]
    (row,) = [row for row in _history(file) if "samples" in row or "samples/_type" in row]
    assert row["step"] == 3
    path = row["samples"]["path"] if "samples" in row else row["samples/path"]
    table = json.loads((file.parent / "files" / path).read_text(encoding="utf-8"))
    assert table["columns"] == ["step", "prompt", "answer", "reference", "score"]
    assert table["data"] == [[3, "2+2?", "5", "4", 0.0], [3, "1+1?", "2", "2", 1.0]]


def test_going_on_continues_the_same_run_even_over_logged_steps(tracked: Path) -> None:
    first, second = (_only(file, "run")[0] for file in _files(tracked))
    assert first.run_id == second.run_id == run_id(tracked)
    assert [row["step"] for row in _history(_files(tracked)[1])] == [4, 5, 6, 7]


def test_project_group_tags_notes_and_config_are_the_configs(tracked: Path) -> None:
    run = _only(_files(tracked)[0], "run")[0]
    assert (run.project, run.run_group, list(run.tags), run.notes) == ("shelf", "first", ["a", "b"], "why")
    assert run.display_name == "tiny_run"
    logged = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert logged["optimizer"]["lr"] == 2e-4
    assert logged["data"]["files"] == ["rows.jsonl"]


@pytest.mark.parametrize("axis", ["step", "tokens"])
def test_charts_run_along_the_axis_of_the_config(axis: str, tracked: Path, tmp_path: Path) -> None:
    folder = tracked if axis == "tokens" else tmp_path / "along_steps"
    if axis == "step":
        _track(folder, _config(), range(1, 2))
    metrics = _only(_files(folder)[0], "metric")
    groups = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    assert groups == dict.fromkeys(["train/*", "eval/*", "data/*", "system/*"], axis)


def test_the_exit_code_says_how_it_ended(tracked: Path) -> None:
    assert [_only(file, "exit")[0].exit_code for file in _files(tracked)] == [130, 0]


def test_all_files_lie_in_the_run_folder_and_nothing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    _track(tmp_path / "run", _config(), range(1, 4))
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "netrc"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"wandb", "wandb_id"}


def test_online_without_a_key_says_what_to_do(tmp_path: Path) -> None:
    config = _config(mode="online")
    assert config.tracking is not None
    with pytest.raises(UserError, match="wandb login"):
        WandbTracker(config.tracking).begin(tmp_path, config, 0, 1)


def test_an_unreachable_server_means_offline_and_the_key_is_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    key = "0123456789abcdef" * 2 + "deadbeef"
    wandb.teardown()  # the settings of this process were read without the two below
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("tuner.training.wandb_tracker.SECONDS_TO_CONNECT", 2.0)
    config, said = _config(), []
    assert config.tracking is not None
    tracker = WandbTracker(config.tracking, report=said.append)
    tracker.begin(tmp_path, config, 0, 1)
    tracker.step(_record(1))
    tracker.end("failed")
    wandb.teardown()
    (file,) = _files(tmp_path)
    assert len(said) == 1
    assert "offline" in said[0]
    assert _only(file, "exit")[0].exit_code == 1
    assert [row["step"] for row in _history(file)] == [1]
    written = [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert written == []
    printed = capfd.readouterr()
    assert key not in printed.out + printed.err + said[0]


def test_a_key_is_found_where_wandb_login_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "a" * 40 + "\n")
    assert has_key()
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_key()


def test_charts_by_name() -> None:
    named = {name: charted(name) for name in ("eval_loss", "lr", "fill", "memory_gib", "kl")}
    assert named == {
        "eval_loss": "eval/loss",
        "lr": "train/lr",
        "fill": "data/fill",
        "memory_gib": "system/memory_gib",
        "kl": "train/kl",
    }


def test_a_report_becomes_tables_charts_and_figures(tmp_path: Path) -> None:
    tracker = WandbTracker(Wandb(mode="offline"))
    tracker.begin(tmp_path, _config(), 0, 1)
    tracker.step(_record(1))
    controls = (["control", "accuracy"], [["seen", 0.9], ["blank", 0.5]])
    tracker.report({"controls": controls, "worst": (["pair", "margin"], [[3, -2.0]])})
    tracker.end("finished")
    found = records(next(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    logged = {
        item.nested_key[0] if item.nested_key else item.key
        for record in found
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
    }
    assert {"report/controls", "report/worst"} <= logged
    assert {name for name in logged if "chart" in name} == {"report/controls_chart_table"}
    summary = {
        item.nested_key[0] if item.nested_key else item.key: item.value_json
        for record in found
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert json.loads(summary["report/controls/seen"]) == 0.9
    assert json.loads(summary["report/controls/blank"]) == 0.5


# PPO


@dataclass(frozen=True)
class Conditioned(Sample):
    condition: str | None = None


POLICY = {
    "step": 1, "tokens": 900, "prompts": 8, "epoch": 0.5, "loss": 0.4, "policy_loss": -0.01, "value_loss": 0.8,
    "replay_loss": 2.3, "replay_tokens": 450, "reward": 0.1, "score": 0.5, "kl": 0.01, "kl_k3": 0.011,
    "entropy": 1.5, "length": 100.0, "ended": 0.9, "repetition": 0.02, "explained_variance": 0.3, "value": 0.2,
    "ratio": 1.0, "clipped": 0.0, "generator_gap": 0.001, "grad_norm_policy": 0.1, "grad_norm_critic": 5.0,
    "lr": 1e-6, "lr_critic": 5e-6, "seconds": 3.0, "seconds/generate": 2.0, "tokens_per_second": 300.0,
    "memory_gib": None, "bad_steps": 0, "score/polite": 0.7, "reward/polite": 0.2, "score/a.b c": 0.3,
    "eval_gold": 0.6, "eval_gold/polite": 0.8, "eval_score": 0.4, "eval_replay_loss": 2.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of PPO with two steps, the first with the critic alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", "/nowhere")
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        folder = tmp_path_factory.mktemp("runs") / "tiny_ppo"
        folder.mkdir()
        config = _config()
        assert config.tracking is not None
        tracker = WandbTracker(config.tracking)
        tracker.begin(folder, config, 0, 2)
        tracker.step({**POLICY, "policy_loss": None, "grad_norm_policy": None})
        tracker.samples(2, [Conditioned("p", "a", "", 1.0, "polite"), Conditioned("q", "b", "", None)])
        tracker.step({**POLICY, "step": 2, "tokens": 1800})
        tracker.end("finished")
    (file,) = _files(folder)
    return file


def test_numbers_of_ppo_go_to_their_own_panels(policy_file: Path) -> None:
    first, second = _history(policy_file)
    for names, group in (
        (("score", "reward", "kl", "kl_k3", "entropy", "length", "ended", "repetition", "ratio"), "ppo"),
        (("clipped", "generator_gap", "policy_loss", "loss", "grad_norm_policy", "lr", "bad_steps"), "ppo"),
        (("value_loss", "explained_variance", "value", "grad_norm_critic", "lr_critic"), "critic"),
        (("tokens", "prompts", "epoch"), "data"),
        (("tokens_per_second",), "system"),
        (("score/polite", "reward/polite", "score/a.b c"), "conditions"),
    ):
        for name in names:
            expected = 1800 if name == "tokens" else POLICY[name]
            assert second[f"{group}/{name}"] == expected
    assert (second["replay/loss"], second["replay/tokens"]) == (2.3, 450)
    assert (second["time/step"], second["time/generate"]) == (3.0, 2.0)
    assert (second["eval/gold"], second["eval/gold/polite"]) == (0.6, 0.8)
    assert (second["eval/score"], second["eval/replay_loss"]) == (0.4, 2.2)
    assert not any(name.startswith("train/") for name in second)
    assert second.keys() - first.keys() >= {"ppo/policy_loss", "ppo/grad_norm_policy"}, "warm-up has none"


def test_panels_of_ppo_run_along_the_axis_and_gold_remembers_its_best(policy_file: Path) -> None:
    metrics = _only(policy_file, "metric")
    groups = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    own = ["ppo/*", "critic/*", "conditions/*", "replay/*", "time/*"]
    assert groups == dict.fromkeys([*own, "train/*", "eval/*", "data/*", "system/*"], "step")
    (gold,) = [metric for metric in metrics if metric.name == "eval/gold" and metric.HasField("summary")]
    assert (gold.summary.max, gold.summary.last) == (True, True)


def test_samples_of_ppo_have_a_column_for_the_condition(policy_file: Path) -> None:
    (row,) = [row for row in _history(policy_file) if "samples" in row or "samples/_type" in row]
    path = row["samples"]["path"] if "samples" in row else row["samples/path"]
    table = json.loads((policy_file.parent / "files" / path).read_text(encoding="utf-8"))
    assert table["columns"] == ["step", "condition", "prompt", "answer", "reference", "score"]
    assert table["data"] == [[2, "polite", "p", "a", "", 1.0], [2, None, "q", "b", "", None]]
