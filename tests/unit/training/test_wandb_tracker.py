"""The W&B door, offline: what it writes is read back from the .wandb file."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

import tuner
from tests.equivalence.conftest import SMALL, SMALL_PPO, SMALL_REWARD
from tuner.config import SFT, Chat, Model, Wandb, override
from tuner.errors import UserError
from tuner.stages.rl.figures import figures
from tuner.stages.run import Run
from tuner.stages.sft.figures import FIGURES
from tuner.training.wandb_tracker import WandbTracker, has_key, run_id
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
        tracking=Wandb(
            project="shelf", group="first", job_type="trial", tags=("a", "b"), notes="why", **tracking
        ),
    )


def _record(step: int, **more: float | None) -> dict[str, Any]:
    return {"step": step, "tokens": 100 * step, "loss": 3.0 / step, "lr": 1e-3, "fill": 0.99,
            "tokens_per_second": 5000.0, "bad_steps": 0, **more}  # fmt: skip


def _track(folder: Path, config: SFT, steps: range, outcome: str = "finished") -> None:
    """What the loop does: at an evaluation the samples come before the record of their step."""
    folder.mkdir(exist_ok=True)
    assert config.tracking is not None
    tracker = WandbTracker(config.tracking, FIGURES)
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
        complete = _records_so_far(file)
        if any(record.WhichOneof("record_type") == "exit" for record in complete):
            return complete
        assert time.monotonic() < deadline, f"{file} never got its exit record"
        time.sleep(0.05)


def _records_so_far(file: Path) -> list[Any]:
    """Protobuf messages in a LevelDB log: blocks of 32 KiB, parts with headers of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parsed, pending = (
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
            parsed.append(record)
            pending = b""
    return parsed


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
    assert (run.project, run.run_group, run.job_type) == ("shelf", "first", "trial")
    assert (list(run.tags), run.notes) == (["a", "b"], "why")
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
        WandbTracker(config.tracking, FIGURES).begin(tmp_path, config, 0, 1)


def test_an_unreachable_server_means_offline_and_the_key_is_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    key = "0123456789abcdef" * 2 + "deadbeef"
    wandb.teardown()  # the settings of this process were read without the two below
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("tuner.training.wandb_tracker.SECONDS_TO_CONNECT", 2.0)
    config, reports = _config(), []
    assert config.tracking is not None
    tracker = WandbTracker(config.tracking, FIGURES, report=reports.append)
    tracker.begin(tmp_path, config, 0, 1)
    tracker.step(_record(1))
    tracker.end("failed")
    wandb.teardown()
    (file,) = _files(tmp_path)
    assert len(reports) == 1
    assert "offline" in reports[0]
    assert _only(file, "exit")[0].exit_code == 1
    assert [row["step"] for row in _history(file)] == [1]
    written = [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert written == []
    printed = capfd.readouterr()
    assert key not in printed.out + printed.err + reports[0]


def test_a_key_is_found_where_wandb_login_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "a" * 40 + "\n")
    assert has_key()
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_key()


def test_charts_by_name() -> None:
    named = {name: FIGURES.charts.chart_of(name) for name in ("eval_loss", "lr", "fill", "memory_gib", "kl")}
    assert named == {
        "eval_loss": "eval/loss",
        "lr": "train/lr",
        "fill": "data/fill",
        "memory_gib": "system/memory_gib",
        "kl": "train/kl",
    }
    chart = figures("grpo", critic=False).charts.chart_of
    assert chart("score/a.b c") == "conditions/score/a.b c"
    assert chart("loss") == "grpo/loss"


def test_a_report_becomes_tables_charts_and_figures(tmp_path: Path) -> None:
    tracker = WandbTracker(Wandb(mode="offline"), FIGURES)
    tracker.begin(tmp_path, _config(), 0, 1)
    tracker.step(_record(1))
    controls = (["control", "accuracy"], [["seen", 0.9], ["blank", 0.5]])
    tracker.report({"controls": controls, "worst": (["pair", "margin"], [[3, -2.0]])})
    tracker.end("finished")
    written = records(next(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    logged = {
        item.nested_key[0] if item.nested_key else item.key
        for record in written
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
    }
    assert {"report/controls", "report/worst"} <= logged
    assert {name for name in logged if "chart" in name} == {"report/controls_chart_table"}
    summary = {
        item.nested_key[0] if item.nested_key else item.key: item.value_json
        for record in written
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert json.loads(summary["report/controls/seen"]) == 0.9
    assert json.loads(summary["report/controls/blank"]) == 0.5


# Records of real runs

PANELS = {
    "sft": {
        "train": "loss lr grad_norm bad_steps",
        "data": "tokens epoch weight_per_token fill passes",
        "eval": "loss",
        "system": "seconds tokens_per_second memory_gib",
    },
    "reward": {
        "train": "loss ranking penalty accuracy margin score lr grad_norm bad_steps",
        "data": "tokens epoch pairs answers fill passes",
        "eval": "loss accuracy",
        "system": "seconds tokens_per_second memory_gib",
    },
    "ppo": {
        "ppo": "loss policy_loss ratio clipped update_kl grad_norm_policy lr_policy score score_std score_min"
        " score_max score_length_correlation score_length_rank_correlation gold gold_top_tenth gold_auc reward kl"
        " kl_per_answer kl_k3 entropy generator_gap length ended repetition bad_steps",
        "critic": "value_loss value explained_variance grad_norm_critic lr_critic",
        "conditions": "score/brief score_length_rank_correlation/brief gold/brief reward/brief",
        "replay": "loss tokens",
        "time": "step generate logprobs scores rewards advantages updates",
        "data": "tokens prompts epoch",
        "eval": "gold gold/polite score score/polite replay_loss",
        "system": "tokens_per_second memory_gib",
    },
}
"""Stage -> panel -> charts, of all that a record holds: a new number needs a place here."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Two tracked steps of each stage, and what is measured after them; PPO's first teaches the critic alone."""
    root, runs = tmp_path_factory.mktemp("real"), {}
    tracked = {"tracking": {"mode": "offline"}, "max_steps": 2, "evaluation.every": 1}
    test = "tuner:sums/test.jsonl"
    policy = {
        "prompts.test_files": [{"path": test, "condition": "polite", "limit": 1}, {"path": test, "limit": 1}],
        "replay.test_files": [{"path": test, "limit": 2}],
        "evaluation.samples": 2,
        "evaluation.rule": f"{__file__}:gold",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", "/nowhere")
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        for stage, config in (("sft", SMALL), ("reward", SMALL_REWARD)):
            runs[stage] = tuner.train(override(config, {**tracked, "data.split.validation": 0.1}), runs=root)
        starts = {"policy.path": str(runs["sft"].folder), "reward.path": str(runs["reward"].folder)}
        runs["ppo"] = tuner.train(override(SMALL_PPO, {**tracked, **policy, **starts}), runs=root)
    return runs


def gold(answer: str, row: dict[str, Any]) -> float:
    return float(answer == row["messages"][-1]["content"])


def _origin(panel: str, chart: str) -> str:
    """The number of metrics.jsonl that a chart shows."""
    if panel == "time":
        return "seconds" if chart == "step" else f"seconds/{chart}"
    return f"{panel}_{chart}" if panel in ("eval", "replay") else chart


@pytest.mark.parametrize("stage", PANELS)
def test_every_number_of_a_real_record_has_its_chart_in_a_panel(real: dict[str, Run], stage: str) -> None:
    run = real[stage]
    (file,) = _files(run.folder)
    origins = {
        f"{panel}/{chart}": _origin(panel, chart)
        for panel, charts in PANELS[stage].items()
        for chart in charts.split()
    }
    assert set(run.metrics[-1]) == {"step", *origins.values()}
    for record, row in zip(run.metrics, _history(file), strict=True):
        shown = {name: value for name, value in row.items() if name.split("/")[0] in PANELS[stage]}
        # a correlation is none where all answers are equally long
        known = {chart: record.get(name) for chart, name in origins.items()}
        assert shown == {chart: value for chart, value in known.items() if value is not None}
        assert {name for name in row.keys() - shown.keys() if not name.startswith(("_", "samples"))} == {
            "step",
            "tokens",
        }
    axes = {metric.glob_name: metric.step_metric for metric in _only(file, "metric") if metric.glob_name}
    assert {panel: axes.get(f"{panel}/*") for panel in PANELS[stage]} == dict.fromkeys(PANELS[stage], "step")


def test_what_the_warm_up_does_not_know_is_left_out(real: dict[str, Run]) -> None:
    first, second = _history(*_files(real["ppo"].folder))
    missing = {"ppo/policy_loss", "ppo/ratio", "ppo/clipped", "ppo/update_kl", "ppo/grad_norm_policy"}
    assert second.keys() - first.keys() == missing | {"replay/loss", "replay/tokens"}


def test_gold_remembers_its_best(real: dict[str, Run]) -> None:
    metrics = _only(*_files(real["ppo"].folder), "metric")
    (gold,) = [metric for metric in metrics if metric.name == "eval/gold" and metric.HasField("summary")]
    assert (gold.summary.max, gold.summary.last) == (True, True)


def test_samples_of_ppo_have_a_column_for_the_condition(real: dict[str, Run]) -> None:
    run, columns = real["ppo"], ["step", "condition", "prompt", "answer", "reference", "score"]
    (file,) = _files(run.folder)
    data = []
    for row in _history(file):
        path = row["samples"]["path"] if "samples" in row else row["samples/path"]
        table = json.loads((file.parent / "files" / path).read_text(encoding="utf-8"))
        assert table["columns"] == columns
        data += table["data"]
    assert data == [[sample[name] for name in columns] for sample in run.samples]
    assert [sample["condition"] for sample in run.samples] == ["polite", None] * 2
