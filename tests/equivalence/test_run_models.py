"""An unfinished run and a checkpoint are models: the same weights as those of a run that ended there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tuner
from tests.equivalence.conftest import SHALLOW, SMALL, SMALL_PPO, SMALL_REWARD
from tests.shallow_models import shallow
from tuner.cli.main import app
from tuner.config import (
    DPO,
    AdamW,
    Constant,
    LoRA,
    Model,
    Preferences,
    StageConfig,
    override,
)
from tuner.errors import UserError
from tuner.stages.run import Run
from tuner.stages.run_models import usable_path

EVERY = {"checkpoint.every": 1, "max_steps": 2}
SMALL_DPO = DPO(
    name="dpo",
    model=Model(path=SHALLOW),
    adapter=LoRA(r=8, alpha=16),
    data=Preferences(files=("tuner:twins/train.jsonl",), template="internlm2", max_length=256, limit=16),
    optimizer=AdamW(lr=1e-3),
    pairs_per_step=4,
    pairs_per_pass=4,
    precision="fp32",
    gradient_checkpointing=False,
)


def rule_ppo(folder: Path, changes: dict[str, object]) -> StageConfig:
    """A small PPO run on the embedded model, rewarded by a rule, so that no other run has to be trained first."""
    (folder / "rules.py").write_text("def length(answer, row):\n    return float(len(answer))\n")
    parts = {
        "policy.path": SHALLOW,
        "adapter": LoRA(r=8, alpha=16),
        "critic_from": "policy",
        "replay": None,
    }
    return override(SMALL_PPO, parts | {"reward": f"{folder}/rules.py:length"} | changes)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a model's folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unfinished(run: Run, folder: Path) -> Path:
    """A copy of a finished run as a kill before its end would leave it."""
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "model")
    (folder / "results.json").unlink()
    return folder


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with a checkpoint of every step."""
    return tuner.train(override(SMALL, EVERY), runs=tmp_path_factory.mktemp("small"))


def usable(path: Path) -> Path:
    """The folder of the model that a path names."""
    return Path(usable_path(str(path))) / "model"


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (SMALL, {}),
        (SMALL, {"model.quantization": "nf4", "precision": "bf16"}),
        (SMALL, {"adapter": None, "optimizer.lr": 1e-3}),
        (
            SMALL,
            {
                "model.path": shallow(2),
                "adapter": None,
                "freeze": {"all_but_last_layers": 1},
                "precision": "bf16",
            },
        ),
        (SMALL, {"adapter.train_whole": ["embed_tokens"]}),
        (SMALL, {"freeze": {"names": ["*lora_A*"]}}),
        (SMALL_REWARD, {"data.split.test": 0.0}),
        (SMALL_REWARD, {"adapter": None, "optimizer.lr": 1e-3}),
        (SMALL_DPO, {}),
    ],
    ids=["adapter", "qlora", "full", "frozen", "whole", "frozen-adapter", "reward", "reward-full", "dpo"],
)
def test_the_model_of_the_last_checkpoint_is_the_run_s(
    config: StageConfig, changes: dict[str, object], tmp_path: Path
) -> None:
    run = tuner.train(override(config, EVERY | changes), runs=tmp_path)
    sentences: list[str] = []
    copy = unfinished(run, tmp_path / "copy")
    model = Path(usable_path(str(copy), say=sentences.append)) / "model"
    assert contents(model) == contents(run.model_folder)
    assert "its model is that of its newest checkpoint" in sentences[0]
    assert usable_path(str(run.folder)) == str(run.folder)


def test_any_checkpoint_is_the_model_of_a_run_of_so_many_steps(tmp_path: Path) -> None:
    config = override(SMALL, EVERY | {"schedule": Constant()})
    run = tuner.train(config, runs=tmp_path / "long")
    short = tuner.train(override(config, {"max_steps": 1}), runs=tmp_path / "short")
    assert contents(usable(run.checkpoints_folder / "step_000001")) == contents(short.model_folder)


@pytest.mark.parametrize(
    "command",
    [
        ("chat", "RUN", "-m", "1+1", "--max-new-tokens", "1"),
        ("merge", "RUN", "merged"),
        ("export", "RUN", "whole"),
    ],
)
def test_commands_take_an_unfinished_run(
    command: tuple[str, ...], small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = unfinished(small_run, tmp_path / "copy")
    done = CliRunner().invoke(app, [str(copy) if word == "RUN" else word for word in command])
    assert done.exit_code == 0, done.output
    assert "newest checkpoint, step_000002" in done.stderr


def test_a_scorer_is_opened_from_an_unfinished_run(tmp_path: Path) -> None:
    run = tuner.train(override(SMALL_REWARD, EVERY), runs=tmp_path)
    row = {"prompt": "What is 2 + 3?", "response": "5."}
    scores = [
        tuner.open_scorer(path).score([row]) for path in (run.folder, unfinished(run, tmp_path / "copy"))
    ]
    assert scores[0] == scores[1] != 0


def test_a_damaged_checkpoint_is_passed_over(small_run: Run, tmp_path: Path) -> None:
    copy = unfinished(small_run, tmp_path / "copy")
    newest = copy / "checkpoints" / "step_000002" / "trained.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    sentences: list[str] = []
    assert usable_path(str(copy), say=sentences.append) == str(copy / "checkpoints" / "step_000001")
    assert "step_000002: this checkpoint is damaged (trained.safetensors" in sentences[0]
    with pytest.raises(UserError, match="is damaged"):
        usable(newest.parent)
    shutil.rmtree(copy / "checkpoints" / "step_000001")
    with pytest.raises(UserError, match="no intact checkpoint"):
        usable(copy)


def test_a_replaced_base_is_refused(tmp_path: Path) -> None:
    base = tuner.train(override(SMALL, {"max_steps": 1, "adapter": None, "name": "base"}), runs=tmp_path)
    config = override(SMALL, EVERY | {"model.path": str(base.folder)})
    copy = unfinished(tuner.train(config, runs=tmp_path), tmp_path / "copy")
    weights = base.model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is another than when it was trained"):
        usable(copy)


def test_a_policy_s_checkpoint_is_what_others_begin_with(tmp_path: Path) -> None:
    config = rule_ppo(tmp_path, {"checkpoint.every": 1, "max_steps": 2, "critic_warmup": 0})
    policy = tuner.train(config, runs=tmp_path)
    copy = unfinished(policy, tmp_path / "copy")
    assert contents(usable(copy)) == contents(policy.model_folder)
    onwards = override(config, {"policy.path": str(copy), "adapter": None, "max_steps": 1})
    begun = tuner.train(onwards, runs=tmp_path / "next")
    assert f"{copy}: this run has not finished" in (begun.folder / "log.txt").read_text()
    assert begun.config.policy.path == str(copy)  # type: ignore[attr-defined]
