"""Models that are kept of the steps that a run passes."""

from __future__ import annotations

from pathlib import Path

import pytest

import tuner
from tests.equivalence.conftest import SMALL, SMALL_REWARD
from tests.equivalence.test_resume import Killed
from tests.equivalence.test_run_models import SMALL_DPO, contents, rule_ppo, usable
from tuner.config import Checkpoint, StageConfig, override
from tuner.errors import UserError
from tuner.models.chat import open_chat
from tuner.stages.run import Run

KEPT = {
    "max_steps": 3,
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
    "checkpoint.milestones": {"early": 1, "middle": 0.6},
}


@pytest.mark.parametrize("stage", ["sft", "full", "reward", "ppo"])
def test_a_milestone_is_the_model_of_its_step(stage: str, tmp_path: Path) -> None:
    configs: dict[str, StageConfig] = {
        "sft": SMALL,
        "full": override(SMALL, {"adapter": None, "optimizer.lr": 1e-3}),
        "reward": SMALL_REWARD,
        "ppo": rule_ppo(tmp_path, {"critic_warmup": 0, "reward_clip": None}),
    }
    run = tuner.train(override(configs[stage], KEPT), runs=tmp_path)
    models = [contents(run.milestone_folder(name)) for name in ("early", "middle")]
    for step, model in enumerate(models, 1):
        assert model == contents(usable(run.checkpoints_folder / f"step_{step:06d}"))
    assert models[0] != models[1] != contents(run.model_folder)
    log = (run.folder / "log.txt").read_text()
    assert f"milestone middle: the model of step 2 is {run.folder}/milestones/middle" in log
    if stage == "ppo":
        open_chat(str(run.milestone_folder("early")))


def test_a_kill_before_a_milestone_is_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of other steps are few and far between: the milestone makes one of its own."""
    config = override(SMALL, KEPT | {"checkpoint.every": None, "checkpoint.keep": 1})
    whole = tuner.train(config, runs=tmp_path / "whole")

    def kill(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr("tuner.stages.model_folder.write_checkpoint_model", kill)
    with pytest.raises(Killed):
        tuner.train(config, runs=tmp_path / "killed")
    monkeypatch.undo()
    run = tuner.train(config, runs=tmp_path / "killed")
    for name in ("early", "middle"):
        assert contents(run.milestone_folder(name)) == contents(whole.milestone_folder(name))


def test_what_is_past_or_beyond_is_said(tmp_path: Path) -> None:
    changes = {"max_steps": 2, "checkpoint.every": 1}
    run = tuner.train(override(SMALL, changes), runs=tmp_path)
    milestones = {"before": 1, "within": 3, "beyond": 9}
    longer = {"max_steps": 3, "checkpoint.milestones": milestones}
    tuner.train(override(SMALL, changes | longer), runs=tmp_path)
    log = Run(run.folder).folder.joinpath("log.txt").read_text()
    assert "milestone before: step 1 is past, so its model is not kept" in log
    assert "milestone beyond: step 9 is beyond the last, 3" in log
    assert [path.name for path in (run.folder / "milestones").iterdir()] == ["within"]


@pytest.mark.parametrize(
    ("milestones", "message"),
    [
        ({"a/b": 1}, "pattern"),
        ({"early": 0.0}, "greater than 0"),
        ({"early": 1.5}, "neither a fraction below 1 nor a whole number of steps"),
    ],
)
def test_names_are_those_of_folders_and_steps_are_whole(milestones: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(SMALL, {"checkpoint.milestones": milestones})


def test_trl_keeps_none() -> None:
    with pytest.raises(UserError, match="cannot be kept by TRL's trainers"):
        override(SMALL_DPO, {"checkpoint": Checkpoint(milestones={"early": 1})})
