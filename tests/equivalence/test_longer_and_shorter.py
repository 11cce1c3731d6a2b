"""A run ends early with a model, and a finished one is made longer: bit for bit where the schedule allows."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

import tuner
from tests.equivalence.conftest import SMALL, SMALL_REWARD
from tests.equivalence.test_run_models import SMALL_DPO, contents, rule_ppo
from tests.forked import exit_code, is_running, tuner_command
from tuner.config import Constant, StageConfig, override, to_json
from tuner.errors import UserError
from tuner.stages.end_run import end_run
from tuner.stages.run import Run
from tuner.training.step import Step

STEADY = {"schedule": Constant(), "max_steps": 2}


def log(run: Run) -> str:
    return (run.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("config", "changes"),
    [(SMALL, {"adapter.dropout": 0.1}), (SMALL_REWARD, {}), (SMALL_DPO, {})],
    ids=["sft", "reward", "dpo"],
)
def test_a_longer_run_is_the_one_that_was_so_long_from_the_start(
    config: StageConfig, changes: dict[str, object], tmp_path: Path
) -> None:
    config = override(config, STEADY | changes)
    run = tuner.train(config, runs=tmp_path)
    tuner.train(override(config, {"max_steps": 4}), runs=tmp_path)
    whole = tuner.train(override(config, {"max_steps": 4}), runs=tmp_path / "whole")
    assert contents(run.model_folder) == contents(whole.model_folder)
    assert [record["loss"] for record in run.metrics] == [record["loss"] for record in whole.metrics]
    assert "max_steps was 2 and is now 4: going on after step 2" in log(run)
    assert (run.folder / "results_000002.json").is_file()


def test_a_longer_policy_run_is_the_one_that_was_so_long_from_the_start(tmp_path: Path) -> None:
    config = rule_ppo(tmp_path, {"schedule": Constant(), "max_steps": 2, "critic_warmup": 1})
    run = tuner.train(config, runs=tmp_path)
    tuner.train(override(config, {"max_steps": 3}), runs=tmp_path)
    whole = tuner.train(override(config, {"max_steps": 3}), runs=tmp_path / "whole")
    assert contents(run.model_folder) == contents(whole.model_folder)
    assert "lr_policy 1.00e-03 -> 1.00e-03, lr_critic 5.00e-03 -> 5.00e-03" in log(run)


def test_a_schedule_that_decays_goes_on_as_that_of_the_longer_run(tmp_path: Path) -> None:
    config = override(SMALL, {"max_steps": 2, "schedule.warmup": 0})
    run = tuner.train(config, runs=tmp_path)
    longer = override(config, {"max_steps": 4})
    tuner.train(longer, runs=tmp_path)
    whole = tuner.train(longer, runs=tmp_path / "whole")
    rates = [[record["lr"] for record in metrics] for metrics in (run.metrics, whole.metrics)]
    assert rates[0][2:] == rates[1][2:]
    assert rates[0][1] == pytest.approx(2.5e-3)  # half of the peak: the second of two steps
    assert "is that of a run of 4 steps from its start: lr 2.50e-03 -> 2.50e-03" in log(run)
    assert tuner.train(longer, runs=tmp_path).metrics == run.metrics  # it has finished again


def test_rows_left_out_at_the_end_of_an_epoch_are_said(tmp_path: Path) -> None:
    config = override(SMALL, {"max_steps": None, "data.limit": 40})
    run = tuner.train(config, runs=tmp_path)
    tuner.train(override(config, {"epochs": 2.0}), runs=tmp_path)
    assert "epochs was 1.0 and is now 2.0" in log(run)
    assert "of the rows are left out" in log(run)


def test_a_run_is_not_made_shorter(tmp_path: Path) -> None:
    tuner.train(override(SMALL, {"max_steps": 2}), runs=tmp_path)
    with pytest.raises(UserError, match="max_steps was 2 and is now 1"):
        tuner.train(override(SMALL, {"max_steps": 1}), runs=tmp_path)


def interrupted(config: StageConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that a signal stopped after its second step."""
    finish = Step.finish

    def stopped(step: Step) -> None:
        if step.index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        finish(step)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "finish", stopped)
        with pytest.raises(BaseException, match="stopped by SIGTERM after step 2"):
            tuner.train(config, runs=folder)
    return Run(folder / str(config.name))


def test_a_stopped_run_ends_at_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(SMALL, {"schedule": Constant()})
    run = interrupted(config, tmp_path, monkeypatch)
    renamed = run.folder.rename(tmp_path / "renamed")
    ending = end_run(renamed)
    ended = ending.run
    assert ending.has_ended
    short = tuner.train(override(config, {"max_steps": 2}), runs=tmp_path / "short")
    assert contents(ended.model_folder) == contents(short.model_folder)
    assert (ended.results or {})["ended_early"] == {"step": 2, "of": 5}
    assert "ended early as requested, after step 2 of 5" in log(ended)
    with pytest.raises(UserError, match="has finished"):
        end_run(renamed)
    # goes on where it ended
    tuner.train(override(config, {"max_steps": 6, "name": "renamed"}), runs=tmp_path)
    assert [record["step"] for record in ended.metrics] == [1, 2, 3, 4, 5, 6]
    assert "ended_early" not in (ended.results or {})


def test_a_run_without_a_checkpoint_cannot_end(tmp_path: Path) -> None:
    run = Run(tmp_path / "new")
    run.start(SMALL, (), {})
    run.release()
    with pytest.raises(UserError, match="no checkpoint yet"):
        end_run(run.folder)
    assert not run.end_requested


def test_stopping_a_stranger_s_run_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(SMALL, tmp_path, monkeypatch)
    config = json.loads((run.folder / "config.json").read_text())
    config["model"]["trust_remote_code"] = True
    (run.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="add --trust"):
        end_run(run.folder)
    assert not run.end_requested


class EndsAfter:
    """Asks a run to end while its first step is recorded, as another process would."""

    def begin(self, run_folder: Path, *_: object) -> None:
        self.run = Run(run_folder)

    def step(self, record: object) -> None:
        self.run.request_end()

    def samples(self, *_: object) -> None: ...

    def message(self, text: str) -> None: ...

    def report(self, tables: object) -> None: ...

    def end(self, outcome: str) -> None:
        self.outcome = outcome


@pytest.mark.parametrize("config", [SMALL, SMALL_DPO], ids=["sft", "dpo"])
def test_a_run_ends_after_the_step_in_which_it_is_asked_to(config: StageConfig, tmp_path: Path) -> None:
    watcher = EndsAfter()
    run = tuner.train(
        override(config, {"max_steps": 4, "schedule": Constant()}), runs=tmp_path, watchers=[watcher]
    )
    results = run.results or {}
    step = results["ended_early"]["step"]
    assert step in (1, 2)  # TRL records a step after it has asked whether to go on
    assert results["ended_early"]["of"] == 4
    assert watcher.outcome == "finished"
    assert len(run.metrics) == step
    short = override(config, {"max_steps": step, "schedule": Constant()})
    assert contents(run.model_folder) == contents(tuner.train(short, runs=tmp_path / "short").model_folder)


def test_a_run_that_another_process_trains_ends_with_success(tmp_path: Path) -> None:
    config = override(SMALL, {"max_steps": 5000, "epochs": 200.0, "name": "other"})
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nfrom tuner.config import from_json\n"
        "config = from_json((Path(__file__).parent / 'config.json').read_text())\n"
    )
    process = tuner_command(tmp_path, "train", "mine.py")
    run = Run(tmp_path / "runs" / "other")
    while not run.folder.is_dir() or not run.metrics:
        assert is_running(process)
        time.sleep(0.1)
    assert not end_run(run.folder).has_ended
    assert exit_code(process) == 0
    assert "\nmodel:" in (tmp_path / "said.txt").read_text()
    results = run.results or {}
    assert results["ended_early"]["step"] == run.metrics[-1]["step"]
    assert run.is_finished
    assert not run.end_requested
