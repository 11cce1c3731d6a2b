"""What a run does by itself when something happens on the way: a bad step, a source used up, a better loss.

And that PPO holds its own where a config is odd and allowed.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tuner
from tests.shallow_models import shallow
from tuner.config import (
    PPO,
    SFT,
    AdamW,
    Chat,
    Checkpoint,
    Evaluation,
    LoRA,
    Model,
    Preferences,
    Prompts,
    RewardModel,
    Sampling,
    Source,
    override,
)
from tuner.errors import DivergedError, UserError
from tuner.evaluation.held_out_chat import HeldOutRows
from tuner.resources import locate
from tuner.stages.run import Run

SMALL = SFT(
    name="small",
    model=Model(path=shallow(2)),
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
    import tuner.stages.sft.loop as stage

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
    """The run with a bad third step ends where the run without the third step's update does: no model, exit code 3."""
    plain = train({"max_steps": 2, "schedule": {"kind": "constant", "warmup": 0.0}}, "plain")
    spoil(monkeypatch, {3})
    spoiled = Run(plain.folder.parent.parent / "spoiled" / "small")
    for _ in range(2):  # and again, from its last checkpoint
        with pytest.raises(
            DivergedError, match="diverged: its last step was skipped, as loss or gradient was not"
        ):
            train({"max_steps": 3, "schedule": {"kind": "constant", "warmup": 0.0}}, "spoiled")
        assert not spoiled.model_folder.exists()
        assert spoiled.results is None
    one, other = (
        load_file(next(run.checkpoints_folder.glob("*/trained.safetensors"))) for run in (plain, spoiled)
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    optimiser = [
        load_file(next(run.checkpoints_folder.glob("*/optimizer.safetensors"))) for run in (plain, spoiled)
    ]
    assert all(torch.equal(tensor, optimiser[1][name]) for name, tensor in optimiser[0].items())


def test_weights_that_overflow_are_no_model(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.training.loop import Loop

    def overflow(self: Loop) -> None:
        with torch.no_grad():
            next(iter(self._updater.parts.values())).own.fill_(float("inf"))

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_save", overflow)
        with pytest.raises(DivergedError, match="weights are not finite"):
            train({"max_steps": 1})


def test_a_held_out_loss_that_is_not_finite_is_no_model(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOutRows, "loss", lambda self: None if self._examples is None else float("nan"))
    with pytest.raises(DivergedError, match="its last validation loss is nan"):
        train({"data.split": {"validation": 0.1}}, "validation")
    with pytest.raises(DivergedError, match=r"after\.loss is nan on held-out rows"):
        train({"data.split": {"test": 0.1}}, "test")


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
    from tuner.display.progress import ProgressWatcher

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
    import tuner.stages.sft.loop as stage

    token_loss, count = stage.token_loss, 0

    def falling(model: Any, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return token_loss(model, batch) * 0.5**count

    monkeypatch.setattr(stage, "token_loss", falling)
    assert log(train(VALIDATED)).count("validation loss rises while training loss falls") == 1


# PPO: what is odd and allowed, and updates that are not finite

POLICY = PPO(
    name="small",
    policy=Model(path="runs/talks"),
    reward=Model(path="runs/scores"),
    prompts=Prompts(files=("prompts.jsonl",), template="internlm2", max_length=64),
    prompts_per_step=8,
    sampling=Sampling(max_new_tokens=8),
    critic_warmup=1,
    critic_lr=1e-3,
    optimizer=AdamW(lr=1e-3),
    tokens_per_pass=512,
    epochs=9.0,
    max_steps=3,
    precision="fp32",
    gradient_checkpointing=False,
    checkpoint=Checkpoint(every=1, keep=1),
)
SCORES = RewardModel(
    name="scores",
    model=SMALL.model,
    adapter=SMALL.adapter,
    conditions={"right": "True sums win.", "short": "Short answers win."},
    data=Preferences(files=("pairs.jsonl",), template="internlm2", max_length=96),
    optimizer=SMALL.optimizer,
    tokens_per_step=512,
    tokens_per_pass=512,
    max_steps=2,
    precision="fp32",
    gradient_checkpointing=False,
)
ASKED = [
    {"prompt": f"What is {number} + 2?", "condition": ("right", "short")[number % 2]} for number in range(12)
]


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def said(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], "condition": "right"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with prompts, and the runs of a policy and of reward models."""
    folder = tmp_path_factory.mktemp("ppo")
    pair = {"prompt": "What is 1 + 2?", "chosen": "1 + 2 = 3", "rejected": "4", "condition": "right"}
    write(folder / "pairs.jsonl", [pair, pair | {"condition": "short", "chosen": "3"}] * 4)
    write(folder / "prompts.jsonl", ASKED)
    write(folder / "one.jsonl", ASKED[:1])
    looked_up = ("user", "What is 3 + 4?"), ("assistant", "Let me look."), ("environment", "7")
    write(folder / "results.jsonl", [said(*looked_up), said(*looked_up[:1], ("system", "Be quick."))] * 4)
    told = ("system", "You add."), ("user", "What is 3 + 4?"), ("system", "Be quick.")
    twice = *told, ("assistant", "7"), ("system", "Again."), ("user", "And 4 + 5?")
    write(folder / "systems.jsonl", [said(*twice), said(told[0], *told)] * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tuner.train(override(SMALL, {"name": "talks", "checkpoint.every": None}))
        tuner.train(SCORES)
    for name in ("talks", "scores"):
        settings = Path(shutil.copytree(folder / "runs" / name / "model", folder / f"{name}_unpadded"))
        settings /= "tokenizer_config.json"
        values = json.loads(settings.read_text())
        assert values.pop("pad_token")
        settings.write_text(json.dumps(values))
    file = Path(shutil.copytree(folder / "runs/scores/model", folder / "indifferent"))
    file /= "adapter_model.safetensors"
    head = "base_model.model.score.weight"
    weights = load_file(file)
    save_file({**weights, head: torch.zeros_like(weights[head])}, file, {"format": "pt"})
    return folder


@pytest.fixture
def answer(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Train PPO with some changes; the figures of every step must be numbers."""
    monkeypatch.chdir(place)

    def run(changes: dict[str, Any]) -> Run:
        done = tuner.train(override(POLICY, changes), runs=tmp_path / "runs")
        for line in (done.folder / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
        weights = load_file(done.model_folder / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())
        return done

    return run


@pytest.mark.parametrize(
    ("changes", "prompts"),
    [
        ({"epochs": 1.0, "prompts_per_step": 64, "mini_batches": 20, "critic_warmup": 0}, [12]),
        ({"epochs": 0.5, "prompts_per_step": 4}, [4]),
        ({"prompts.files": ["one.jsonl"], "prompts_per_step": 4}, [4, 4]),
        ({"prompts.files": ["one.jsonl"], "prompts_per_step": 1, "whiten_advantages": True}, [1, 1, 1]),
        ({"sampling.max_new_tokens": 1, "whiten_advantages": True}, [8, 8, 8]),
        ({"sampling.top_p": 1e-9}, [8, 8, 8]),
        ({"sampling.temperature": 0.1}, [8, 8, 8]),
        ({"sampling.temperature": 5.0, "sampling.top_p": 1.0}, [8, 8, 8]),
        ({"reward.path": "indifferent", "whiten_advantages": True}, [8, 8, 8]),
        ({"policy.path": "talks_unpadded", "reward.path": "scores_unpadded"}, [8, 8, 8]),
        ({"prompts.files": ["results.jsonl"], "prompts.max_length": 128}, [8, 8, 8]),
        ({"prompts.files": ["systems.jsonl"], "prompts.max_length": 128, "prompts.system": "Or."}, [8, 8, 8]),
        ({"replay": {"files": ["tuner:sums/train.jsonl"], "template": "internlm2", "max_length": 64, "limit": 1}},
         [8, 8, 8]),
    ],
)  # fmt: skip
def test_what_is_odd_and_allowed_in_ppo(
    answer: Callable[..., Run], changes: dict[str, Any], prompts: list[int]
) -> None:
    run = answer(changes)
    assert [record["prompts"] for record in run.metrics] == prompts
    assert run.metrics[-1]["bad_steps"] == 0
    limit = changes.get("sampling.max_new_tokens", POLICY.sampling.max_new_tokens)
    assert all(1 <= record["length"] <= limit for record in run.metrics)
    if changes.get("reward.path") == "indifferent":
        assert run.metrics[0]["reward"] == run.metrics[0]["score"] == 0.0


def test_a_warm_up_as_long_as_the_run_leaves_the_policy_alone(answer: Callable[..., Run]) -> None:
    run = answer({"critic_warmup": 3})
    folders = (run.model_folder, Path("runs/talks/model"))
    trained, started = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(tensor, started[name]) for name, tensor in trained.items())
    assert all(record["kl"] == 0.0 and record["lr_policy"] == 0.0 for record in run.metrics)
    assert not any("policy_loss" in record for record in run.metrics)


def spoil_values(monkeypatch: pytest.MonkeyPatch, passes: set[int]) -> None:
    """Make the critic's loss of some passes, counted from 1, not finite."""
    import tuner.algorithms.ppo as algorithm

    value_loss, count = algorithm.value_loss, 0

    def spoiled(*given: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return value_loss(*given) * (float("nan") if count in passes else 1.0)

    monkeypatch.setattr(algorithm, "value_loss", spoiled)


@pytest.mark.parametrize("allowed", [2, 3])
def test_ppo_skips_bad_updates_and_too_many_bad_steps_end_the_run(
    answer: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allowed: int
) -> None:
    """A bad loss of the critic alone: neither critic nor policy follows it. One update a step, of one pass."""
    changes = {"max_bad_steps": allowed, "max_steps": 4, "critic_warmup": 0}
    with monkeypatch.context() as patch:
        spoil_values(patch, {2, 3})
        if allowed == 3:
            run = answer(changes)
            assert [record["value_loss"] is None for record in run.metrics] == [False, True, True, False]
            assert [record["policy_loss"] is None for record in run.metrics] == [False, True, True, False]
            assert [record["bad_steps"] for record in run.metrics] == [0, 1, 2, 2]
            return
        with pytest.raises(UserError, match="not finite for 2 steps in a row"):
            answer(changes)
    run = Run(tmp_path / "runs" / "small")
    assert run.results is None
    origins = (run.folder / "bad_step_000003" / "origins.txt").read_text().splitlines()
    assert len(origins) == 8
    assert all(origin.startswith("prompts.jsonl:") for origin in origins)
    assert len(answer(changes).metrics) == 4, "it goes on when the cause is gone"


def test_an_update_that_is_skipped_leaves_both_roles_alone(
    answer: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run whose second step is bad ends where the one without a second step does."""
    changes = {"critic_warmup": 0, "max_steps": 1}
    plain = answer({**changes, "name": "plain"})
    spoil_values(monkeypatch, {2})
    with pytest.raises(DivergedError, match="its last step was skipped"):
        answer({**changes, "name": "spoiled", "max_steps": 2})
    spoiled = Run(plain.folder.with_name("spoiled"))
    one, other = (
        load_file(next(run.checkpoints_folder.glob("*/trained.safetensors"))) for run in (plain, spoiled)
    )
    assert {name.partition(".")[0] for name in one} == {"policy", "critic"}
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_too_high_a_kl_ends_the_run_and_says_so(answer: Callable[..., Run]) -> None:
    changes = {"critic_warmup": 0, "optimizer.lr": 0.3, "max_steps": 9, "max_kl": 0.5, "schedule.warmup": 0.0}
    run = answer(changes)
    kl = [record["kl"] for record in run.metrics]
    assert len(kl) < 9
    assert kl[-1] > 0.5
    assert all(value <= 0.5 for value in kl[:-1])
    assert f"stopping after step {len(kl)}: KL from the reference is" in log(run)
    assert run.results is not None
    assert run.results["kl"] == kl[-1]


@pytest.mark.parametrize("sign", ["kl", "ended"])
def test_an_alarm_ends_the_run_and_says_so(
    answer: Callable[..., Run], sign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sign == "kl":
        monkeypatch.setattr("tuner.rollout.health.KL_LIMITS", (0.5,))
    else:
        monkeypatch.setattr("tuner.rollout.health.Health._no_longer_end", lambda self, ended: True)
    changes = {"critic_warmup": 0, "optimizer.lr": 0.3, "max_steps": 9, "schedule.warmup": 0.0}
    run = answer(changes | {f"alarms.{sign}": "stop"})
    assert run.results is not None
    alarm, steps = run.results["alarm"], len(run.metrics)
    assert steps < 9
    assert alarm["sign"].partition(" ")[0] == sign
    assert (alarm["step"], alarm["action"], alarm["model_step"]) == (steps, "stop", steps)
    assert f"stopping after step {steps}: alarms.{sign}='stop'" in log(run)


@pytest.mark.parametrize("measure", ["gold", "score"])
def test_the_policy_that_scored_best_is_the_model(
    answer: Callable[..., Run], measure: str, place: Path
) -> None:
    write(place / "held_out.jsonl", [row | {"prompt": f"{row['prompt']} Think."} for row in ASKED])
    (place / "rules.py").write_text("def gold(answer, row):\n    return 1 / (1 + len(answer))\n")
    changes = {
        "critic_warmup": 0,
        "optimizer.lr": 0.3,
        "max_steps": 4,
        "prompts.test_files": ["held_out.jsonl"],
        "evaluation": {"every": 1, "rule": "rules.py:gold", "keep_best": measure},
    }
    run = answer(changes)
    values = [record[f"eval_{measure}"] for record in run.metrics]
    best = values.index(max(values)) + 1
    if best < 4:
        assert f"the model is that of step {best}, with the best held-out" in log(run)
    assert run.results is not None
    assert run.results[measure]["after"] == pytest.approx(max(values))
    assert run.results["kl"] == run.metrics[best - 1]["kl"]
    kept = load_file(run.checkpoints_folder / f"step_{best:06d}" / "trained.safetensors")
    saved = load_file(run.model_folder / "adapter_model.safetensors")
    own = [tensor for name, tensor in kept.items() if name.startswith("policy.")]
    assert sorted(float(tensor.sum()) for tensor in own) == sorted(
        float(tensor.sum()) for tensor in saved.values()
    )


def test_a_source_of_prompts_that_is_used_up_is_said(answer: Callable[..., Run]) -> None:
    write(Path("few.jsonl"), ASKED[:3])
    shares = [{"path": path, "share": 1.0} for path in ("few.jsonl", "prompts.jsonl")]
    run = answer({"prompts.files": shares, "epochs": 1.0, "prompts_per_step": 3, "max_steps": 5})
    told = [line for line in log(run).splitlines() if "used up" in line]
    assert len(told) == 1
    assert "few.jsonl is used up at step" in told[0]
