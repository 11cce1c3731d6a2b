"""A run that an alarm ends or rolls back is the same however it is killed around the alarm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tuner
from tests.equivalence.test_resume import Killed, kill_at
from tests.equivalence.test_run_models import contents, rule_ppo, usable
from tuner.config import StageConfig, override
from tuner.stages.run import Run

STEPS, SOUND, SPEAKS = 5, 2, 4
"""Steps in all; steps whose answers are right; the second wrong step, with which the alarm speaks."""
RULES = """
import pathlib


def gold(answer, row):
    metrics = pathlib.Path(__file__).parent / "ppo" / "metrics.jsonl"
    return float(not metrics.exists() or len(metrics.read_text().splitlines()) < {sound})
"""


def alarmed(runs: Path, changes: dict[str, Any]) -> StageConfig:
    """A small run with a checkpoint of every step, whose answers are all right at first, and then all wrong."""
    runs.mkdir()
    small = {"sampling.max_new_tokens": 4, "tokens_per_pass": 1_024, "epochs": 9, "max_steps": STEPS}
    # a clip would give all answers the same score
    config = rule_ppo(runs, {**small, "reward_clip": None, "checkpoint.every": 1})
    (runs / "gold.py").write_text(RULES.format(sound=SOUND), encoding="utf-8")
    measured = {"evaluation.rule": f"{runs}/gold.py:gold", "evaluation.every": 99, "evaluation.rows": 4}
    return override(config, {**measured, "prompts.split.test": 0.1, "checkpoint.keep": 1, **changes})


def outcome(run: Run) -> tuple[dict[str, bytes], Any, list[float]]:
    """The model's files, the results, and the scores of the rollouts."""
    return contents(run.model_folder), run.results, [record["score"] for record in run.metrics]


@pytest.fixture(scope="module", autouse=True)
def _few_answers_speak() -> Iterator[None]:
    """A rollout of 8 answers has a best tenth of one, for which two wrong steps would be no sign."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.rollout.health.CHANCE", 1.0)
        yield


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that rolled back, never killed."""
    runs = tmp_path_factory.mktemp("alarms") / "whole"
    return tuner.train(alarmed(runs, {"alarms.exploits": "roll_back"}), runs=runs)


def test_the_model_is_that_of_the_last_sound_checkpoint(rolled_back: Run) -> None:
    results = rolled_back.results
    assert results is not None
    assert results["alarm"] == {
        "sign": "exploits",
        "step": SPEAKS,
        "action": "roll_back",
        "model_step": SOUND,
    }
    assert results["ended_early"] == {"step": SPEAKS, "of": STEPS}
    assert results["kl"] == rolled_back.metrics[SOUND - 1]["kl"]
    # keep=1 would have removed it
    assert contents(rolled_back.model_folder) == contents(
        usable(rolled_back.checkpoints_folder / f"step_{SOUND:06d}")
    )
    log = (rolled_back.folder / "log.txt").read_text(encoding="utf-8")
    assert (
        f"stopping after step {SPEAKS}: alarms.exploits='roll_back'; the model becomes that of step {SOUND}"
        in log
    )


@pytest.mark.parametrize(("step", "before_finish"), [(SPEAKS - 2, False), (SPEAKS - 1, False)])
def test_killed_around_the_alarm(rolled_back: Run, tmp_path: Path, step: int, before_finish: bool) -> None:
    config = alarmed(tmp_path / "killed", {"alarms.exploits": "roll_back"})
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step, before_finish=before_finish)
        with pytest.raises(Killed):
            tuner.train(config, runs=tmp_path / "killed")
    assert outcome(tuner.train(config, runs=tmp_path / "killed")) == outcome(rolled_back)


def test_a_stop_keeps_the_last_model(rolled_back: Run, tmp_path: Path) -> None:
    run = tuner.train(alarmed(tmp_path / "stopped", {"alarms.exploits": "stop"}), runs=tmp_path / "stopped")
    assert run.results is not None
    assert run.results["alarm"] == {
        "sign": "exploits",
        "step": SPEAKS,
        "action": "stop",
        "model_step": SPEAKS,
    }
    assert contents(run.model_folder) == contents(usable(run.checkpoints_folder / f"step_{SPEAKS:06d}"))
    assert contents(run.model_folder) != contents(rolled_back.model_folder)


def test_without_a_sound_checkpoint_the_model_stays(tmp_path: Path) -> None:
    changes = {"alarms.exploits": "roll_back", "checkpoint.every": SPEAKS - 1}
    run = tuner.train(alarmed(tmp_path / "late", changes), runs=tmp_path / "late")
    assert run.results is not None
    assert run.results["alarm"]["model_step"] == SPEAKS
    assert "no checkpoint was saved before it went wrong" in (run.folder / "log.txt").read_text(
        encoding="utf-8"
    )
