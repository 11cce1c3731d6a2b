"""Killed anywhere, a run goes on bit for bit: losses, order of the data, weights, generators."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tuner
from tests.equivalence.conftest import SHALLOW, curve, weights
from tests.forked import exit_code, fork, is_running, tuner_command
from tuner.config import to_json
from tuner.errors import UserError
from tuner.resources import locate
from tuner.stages.run import Run
from tuner.training.snapshot import TensorFile
from tuner.training.step import Step

STEPS = 5
RICH = {"adapter.dropout": 0.1, "checkpoint.every": 1, "max_steps": STEPS}
"""Dropout, so that generators matter; a checkpoint every step."""


class Killed(BaseException):
    """Stands for a kill that leaves no time to clean up."""


def kill_at(monkeypatch, step, *, before_finish):
    finish = Step.finish

    def killed(self):
        if self.index == step and before_finish:
            raise Killed
        finish(self)
        if self.index == step:
            raise Killed

    monkeypatch.setattr(Step, "finish", killed)


@pytest.fixture
def whole(small, train):
    return train(small(RICH), "whole")


@pytest.mark.parametrize("before_finish", [True, False])
@pytest.mark.parametrize("step", range(STEPS))
def test_killed_at_every_step(small, train, tmp_path, whole, step, before_finish):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step, before_finish=before_finish)
        with pytest.raises(Killed):
            train(small(RICH), "killed")
    resumed = train(small(RICH), "killed")
    assert curve(resumed) == curve(whole)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


@pytest.mark.parametrize(
    "kind",
    [
        {"optimizer.bits": 8, "optimizer.paged": True, "model.quantization": "nf4"},
        {"adapter": None, "optimizer.lr": 1e-3, "optimizer.bits": 8},
        {"adapter": None, "optimizer.lr": 1e-3, "precision": "bf16", "gradient_checkpointing": True},
        {
            "data.split.validation": 0.2,
            "evaluation.every": 2,
            "evaluation.samples": 2,
            "evaluation.keep_best": True,
        },
    ],
    ids=["qlora-8bit-paged", "full-8bit", "full-bf16", "with-evaluation"],
)
def test_every_kind_of_state_is_restored(small, train, kind):
    changes = {"checkpoint.every": 2, "max_steps": STEPS, **kind}
    whole = train(small(changes), "whole")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 3, before_finish=True)
        with pytest.raises(Killed):
            train(small(changes), "killed")
    resumed = train(small(changes), "killed")
    assert curve(resumed) == curve(whole)
    assert [record.get("eval_loss") for record in resumed.metrics] == [
        record.get("eval_loss") for record in whole.metrics
    ]
    assert resumed.samples == whole.samples
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_a_kill_during_the_write_leaves_the_checkpoint_before(small, train, tmp_path, whole):
    write = TensorFile.write

    def half_written(file, path):
        if path.parent.name.endswith("step_000003"):
            path.write_bytes(b"half")
            os._exit(9)
        write(file, path)

    def train_in_child():
        TensorFile.write = half_written
        tuner.train(small(RICH), runs=tmp_path / "killed")

    assert exit_code(fork(train_in_child)) == 9
    run = Run(tmp_path / "killed" / "small")
    assert (run.checkpoints_folder / ".writing-step_000003").is_dir()
    assert not (run.checkpoints_folder / "step_000003").exists()
    resumed = train(small(RICH), "killed")
    assert curve(resumed) == curve(whole)
    assert not list(run.checkpoints_folder.glob(".writing-*"))


def test_a_full_disk_is_said_and_nothing_is_lost(small, train, whole, monkeypatch):
    write = TensorFile.write

    def no_space(file, path):
        if "step_000003" in path.parent.name:
            raise OSError(28, "No space left on device")
        write(file, path)

    monkeypatch.setattr(TensorFile, "write", no_space)
    with pytest.raises(UserError, match="the disk is full"):
        train(small(RICH), "full")
    monkeypatch.undo()
    assert curve(train(small(RICH), "full")) == curve(whole)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_signals_to_a_real_process(small, tmp_path, number, code):
    """Its later steps wait a little, so that the signal comes before the last."""
    config = small({"max_steps": 30, "checkpoint.every": 7})
    (tmp_path / "config.json").write_text(to_json(config))
    file = tmp_path / "config.py"
    file.write_text(
        "from pathlib import Path\nfrom tuner.config import from_json\n"
        f"config = from_json(Path({str(tmp_path / 'config.json')!r}).read_text())\n"
        "import time\nfrom tuner.training.step import Step\nfinish = Step.finish\n"
        "def waiting(self):\n    finish(self)\n    time.sleep(0.2 * (self.index > 7))\n"
        "Step.finish = waiting\n"
    )
    run = Run(tmp_path / "killed" / "small")
    process = tuner_command(tmp_path, "train", "config.py", "--runs", "killed")
    while len(run.metrics) < 9 and is_running(process):
        time.sleep(0.02)
    os.kill(process, number)
    ended, said = exit_code(process), (tmp_path / "said.txt").read_text()
    assert ended == code, said
    assert "Traceback" not in said
    assert 9 <= len(run.metrics) < 30
    resumed = tuner.train(config, runs=tmp_path / "killed")
    assert curve(resumed) == curve(tuner.train(config, runs=tmp_path / "whole"))


def test_a_flipped_bit_is_never_trained_on(small, train, whole):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 3, before_finish=True)
        with pytest.raises(Killed):
            train(small(RICH), "killed")
    run = Run(whole.folder.parent.parent / "killed" / "small")
    newest = run.checkpoints_folder / "step_000003" / "trained.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(
        UserError, match=r"step_000003: this checkpoint is damaged \(trained\.safetensors is not"
    ):
        train(small(RICH), "killed")
    resumed = train(small(RICH | {"checkpoint.skip_damaged": True}), "killed")
    assert "damaged-step_000003: set aside" in (run.folder / "log.txt").read_text()
    assert curve(resumed) == curve(whole)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_a_changed_config_is_refused_with_its_differences(small, train):
    train(small({"max_steps": 2}))
    with pytest.raises(UserError, match=r"optimizer\.lr was 0\.005 and is now 0\.1"):
        train(small({"max_steps": 2, "optimizer.lr": 0.1}))


def test_what_changes_no_result_may_change(small, train):
    run = train(small({"max_steps": 2}))
    assert train(small({"max_steps": 2, "checkpoint.keep": 5})).results == run.results


def test_a_finished_run_is_not_trained_again(small, train, monkeypatch):
    run = train(small({"max_steps": 2}))
    before = (run.folder / "metrics.jsonl").stat().st_mtime_ns
    train(small({"max_steps": 2}))
    assert (run.folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_locked_folder_is_refused(small, train, tmp_path):
    holder = Run(tmp_path / "runs" / "small")
    holder.start(small(), (), {})
    with pytest.raises(UserError, match=f"process {os.getpid()} is training here"):
        train(small())
    holder.release()
    train(small({"max_steps": 5}))


def test_changed_data_are_refused(small, train, tmp_path):
    lines = Path(locate("tuner:sums/train.jsonl")).read_text(encoding="utf-8").splitlines()[:200]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    config = small({"data.files": [str(file)], "checkpoint.every": 1})
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 1, before_finish=True)
        with pytest.raises(Killed):
            train(config)
    file.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UserError, match="the data changed since this run began"):
        train(config)


def test_a_replaced_base_is_refused(small, train, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(SHALLOW, base)
    config = small({"model.path": str(base), "checkpoint.every": 1})
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 1, before_finish=True)
        with pytest.raises(Killed):
            train(config)
    tensors = load_file(base / "model.safetensors")
    tensors["output.weight"] = tensors["output.weight"] + 0.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the base changed since this run began"):
        train(config)


def test_a_text_with_odd_line_separators_does_not_stop_a_resume(tmp_path):
    from tuner.training.watchers import Sample

    run = Run(tmp_path)
    text = "one\u2028two\x1c\x85three"
    for step in (1, 2):
        run.record({"step": step, "loss": 1.0})
        run.record_samples(step, [Sample(text, text, text, None)])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')  # a kill in the middle of a line
    run.rewind(1)
    assert [record["step"] for record in run.metrics] == [1]
    assert [sample["answer"] for sample in run.samples] == [text]
