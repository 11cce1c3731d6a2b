"""What a run does by itself when something happens on the way: a bad step, a source used up, a better loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tuner
from tuner.config import SFT, AdamW, Chat, Checkpoint, Evaluation, LoRA, Model, Source, override
from tuner.errors import UserError
from tuner.evaluation.held_out import HeldOutRows
from tuner.resources import locate
from tuner.training.run import Run

SMALL = SFT(
    name="small",
    model=Model(path="tuner:tiny"),
    adapter=LoRA(r=4),
    data=Chat(files=("tuner:sums/train.jsonl",), template="internlm2", max_length=64, limit=100),
    optimizer=AdamW(lr=5e-3),
    tokens_per_step=256,
    tokens_per_pass=256,
    max_steps=6,
    precision="fp32",
    gradient_checkpointing=False,
    evaluation=Evaluation(samples=0),
    checkpoint=Checkpoint(every=1, keep=1),
)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Run]:
    return lambda changes=None, place="runs": tuner.train(
        override(SMALL, changes or {}), runs=tmp_path / place
    )


def log(run: Run) -> str:
    return (run.folder / "log.txt").read_text()


def losses(run: Run) -> list[float | None]:
    return [record["loss"] for record in run.metrics]


# Steps that are not finite


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], how: str = "nan") -> None:
    """Make the losses of some passes, counted from 1, not finite."""
    import tuner.stages.sft as stage

    token_loss, count = stage.token_loss, 0

    def spoiled(model: Any, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return token_loss(model, batch) * (float(how) if count in steps else 1.0)

    monkeypatch.setattr(stage, "token_loss", spoiled)


@pytest.mark.parametrize("how", ["nan", "inf"])
def test_a_bad_step_is_skipped_and_counted(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    spoil(monkeypatch, {3}, how)
    run = train()
    assert [loss is None for loss in losses(run)] == [False, False, True, False, False, False]
    assert [record["bad_steps"] for record in run.metrics] == [0, 0, 1, 1, 1, 1]
    assert "step 3: loss or gradient is not finite; skipped" in log(run)
    weights = load_file(run.model_folder / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are no JSON


def test_a_skipped_step_leaves_weights_and_optimiser_alone(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run with a bad third step ends where the run without the third step's update does."""
    plain = train({"max_steps": 2, "schedule": {"kind": "constant", "warmup": 0.0}}, "plain")
    spoil(monkeypatch, {3})
    spoiled = train({"max_steps": 3, "schedule": {"kind": "constant", "warmup": 0.0}}, "spoiled")
    one, other = (load_file(run.model_folder / "adapter_model.safetensors") for run in (plain, spoiled))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    optimiser = [
        load_file(next(run.checkpoints_folder.glob("*/optimizer.safetensors"))) for run in (plain, spoiled)
    ]
    assert all(torch.equal(tensor, optimiser[1][name]) for name, tensor in optimiser[0].items())


@pytest.mark.parametrize("allowed", [2, 3])
def test_bad_steps_are_skipped_and_too_many_end_the_run(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allowed: int
) -> None:
    """In a row: two, then a good one, then two again are not three. The rows of the last are kept."""
    with monkeypatch.context() as patch:
        spoil(patch, {1, 2, 4, 5})
        if allowed == 3:
            run = train({"max_bad_steps": allowed})
            assert [loss is None for loss in losses(run)] == [True, True, False, True, True, False]
            return
        with pytest.raises(UserError, match=r"not finite for 2 steps in a row; .* lower optimizer\.lr"):
            train({"max_bad_steps": allowed})
    run = Run(tmp_path / "runs" / "small")
    assert run.results is None
    (kept,) = run.folder.glob("bad_step_*")
    assert kept.name == "bad_step_000002"
    origins = (kept / "origins.txt").read_text().splitlines()
    assert origins
    assert all(":" in origin and origin.split(":")[0].endswith("train.jsonl") for origin in origins)
    batch = load_file(kept / "rank0_pass0.safetensors")
    assert len(batch["offsets"]) - 1 == len(origins)
    assert batch["tokens_T"].dtype == torch.int64
    assert not list(run.folder.glob("model"))


def test_a_run_that_ended_so_goes_on_when_the_cause_is_gone(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, {3, 4, 5})
        with pytest.raises(UserError, match="3 steps in a row"):
            train()
    assert [loss is None for loss in losses(train())] == [False, False, True, True, False, False]


# Whoever looks on


def test_a_watcher_that_raises_does_not_stop_training(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tuner.training.progress import ProgressWatcher

    def step(self: ProgressWatcher, record: dict[str, Any]) -> None:
        raise OSError("the terminal is gone")

    plain = train(place="plain")
    monkeypatch.setattr(ProgressWatcher, "step", step)
    watched = train(place="watched")
    assert losses(watched) == losses(plain)
    assert watched.results == plain.results
    said = capsys.readouterr().err
    assert said.count("ProgressWatcher failed in step (OSError: the terminal is gone)") == 1
    assert "training goes on" in said


# Sources


def test_a_source_that_is_used_up_is_said(train: Callable[..., Run], tmp_path: Path) -> None:
    """Equal shares of 20 and of 100 rows: the smaller is over after 40 rows or so, and the other goes on."""
    rows = Path(locate("tuner:sums/train.jsonl")).read_text(encoding="utf-8").splitlines()
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    few.write_text("\n".join(rows[:20]) + "\n")
    many.write_text("\n".join(rows[20:120]) + "\n")
    sources = [Source(path=str(file), share=1.0) for file in (many, few)]
    run = train({"data.files": sources, "max_steps": None, "epochs": 1.0})
    said = [line for line in log(run).splitlines() if "used up" in line]
    assert len(said) == 1, "the one that lasts to the end is not worth a word"
    assert "few.jsonl" in said[0]
    step = int(
        "".join(character for character in said[0].partition("step")[2].split()[0] if character.isdigit())
    )
    assert 2 <= step <= len(run.metrics) / 2, "an epoch is three times as long as the smaller source lasts"


# Held-out loss


def pretend(monkeypatch: pytest.MonkeyPatch, validation: list[float]) -> None:
    """Let the validation losses be these, one after the other; other rows are measured as ever."""
    loss, left = HeldOutRows.loss, iter(validation)

    def pretended(self: HeldOutRows) -> float | None:
        return next(left) if self._examples is not None else loss(self)

    monkeypatch.setattr(HeldOutRows, "loss", pretended)


VALIDATED = {"data.split.validation": 0.2, "evaluation.every": 1}


def test_early_stopping_and_the_best_checkpoint(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, [3.0, 2.0, 2.5, 2.4, 1.0])
    run = train({**VALIDATED, "evaluation.patience": 2, "evaluation.keep_best": True})
    assert [record["eval_loss"] for record in run.metrics] == [3.0, 2.0, 2.5, 2.4]
    assert "no better validation loss in 2 measurements: stopping early" in log(run)
    assert "the model is that of step 2" in log(run)
    assert run.results is not None
    names = sorted(path.name for path in run.checkpoints_folder.iterdir())
    assert names == ["step_000002", "step_000004"], "the best, and the last"
    model, best, last = (
        load_file(file)
        for file in (
            run.model_folder / "adapter_model.safetensors",
            *(run.checkpoints_folder / name / "trained.safetensors" for name in names),
        )
    )
    plain = {name.replace(".default.", "."): tensor for name, tensor in best.items()}
    ends = {
        name: next(other for other in model if other.endswith(name.partition("layers")[2])) for name in plain
    }
    assert all(torch.equal(tensor, model[ends[name]]) for name, tensor in plain.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in best.items())


def test_without_patience_and_keep_best_neither_acts(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    run = train(VALIDATED)
    assert len(run.metrics) == 6
    assert [path.name for path in run.checkpoints_folder.iterdir()] == ["step_000006"]
    assert "stopping early" not in log(run)
    assert "the model is that of" not in log(run)


def test_learning_by_heart_is_said_once(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    import tuner.stages.sft as stage

    token_loss, count = stage.token_loss, 0

    def falling(model: Any, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return token_loss(model, batch) * 0.5**count

    monkeypatch.setattr(stage, "token_loss", falling)
    assert log(train(VALIDATED)).count("validation loss rises while training loss falls") == 1
