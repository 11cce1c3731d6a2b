"""PPO on a plain base: what is refused or said before a step is taken, and what is measured when the last is."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tuner
from tests.equivalence.conftest import SHALLOW, SMALL_PPO
from tests.equivalence.test_resume import Killed
from tuner.cli.check import check as check_command
from tuner.config import PPO, Model, override, to_json
from tuner.errors import DivergedError, UserError
from tuner.evaluation.held_out_policy import HeldOutPolicy, PolicyMeasurement
from tuner.rollout.engine import LocalEngine
from tuner.rollout.reward_sources import ModelReward
from tuner.stages.check import check
from tuner.stages.run import Run

model_folder = importlib.import_module("tuner.stages.model_folder")
MEASURED = {
    "prompts_per_step": 4,
    "prompts.test_files": [{"path": "tuner:sums/test.jsonl", "condition": "polite", "limit": 4}],
    "replay.test_files": [{"path": "tuner:sums/test.jsonl", "limit": 3}],
    "evaluation.every": 2,
    "evaluation.rule": f"{__file__}:short",
}


def short(answer: str, row: dict[str, Any]) -> float:
    return 1 / (1 + len(answer))


@pytest.fixture
def plain(start) -> Callable[..., PPO]:
    """PPO with a fresh adapter on the embedded model, on which the reward model's adapter was trained."""

    def made(changes: dict[str, Any] | None = None, reward: dict[str, Any] | None = None) -> PPO:
        judge = start("reward", {"max_steps": 2} | (reward or {}))
        starts = {
            "policy.path": SHALLOW,
            "adapter": {"r": 8, "alpha": 16},
            "reward.path": str(judge.folder),
        }
        return override(SMALL_PPO, starts | (changes or {}))

    return made


@pytest.fixture
def measurements(monkeypatch) -> list[PolicyMeasurement]:
    """Every measurement of the policy."""
    measured: list[PolicyMeasurement] = []
    measure = HeldOutPolicy.measure

    def recording(self: HeldOutPolicy) -> PolicyMeasurement:
        measured.append(measure(self))
        return measured[-1]

    monkeypatch.setattr(HeldOutPolicy, "measure", recording)
    return measured


def strict(file: Path) -> Any:
    """JSON as others read it: without NaN and Infinity."""

    def refused(name: str) -> None:
        raise ValueError(name)

    return json.loads(file.read_text(), parse_constant=refused)


# Before the first step


def test_a_rule_without_a_prompt_that_is_held_out(plain, tmp_path):
    config = plain({"prompts.split": {"test": 1e-9}, "evaluation.rule": f"{__file__}:short"})
    said = "evaluation.rule: no prompt is held out for it to measure.*give prompts.test_files"
    with pytest.raises(UserError, match=said):
        check(config)
    with pytest.raises(UserError, match=said):
        tuner.train(config, runs=tmp_path)
    assert not list(tmp_path.iterdir())
    assert check(plain({"prompts.split": {"test": 1e-9}})).steps == 4


@pytest.fixture
def other_base(tmp_path) -> str:
    """The embedded model with one weight changed."""
    folder = tmp_path / "other"
    shutil.copytree(SHALLOW, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["output.weight"] = tensors["output.weight"] * 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_one_base_is_counted_once(plain, other_base):
    """A plain base has no record of what it is: its fingerprint says that the reward model stands on it."""
    one, two = check(plain()), check(plain(reward={"model.path": other_base}))
    assert one.warnings == ()
    (said,) = two.warnings
    assert "policy and reward model stand on two bases, which are both held" in said
    settings = json.loads((Path(other_base) / "config.json").read_text())
    head = settings["vocab_size"] * settings["hidden_size"]  # a reward model has a scalar one instead
    assert (two.peak_gib - one.peak_gib) * 2**30 == pytest.approx(4 * (one.parameters - head), rel=0.01)
    assert check(plain({"roles": "separate"}, {"model.path": other_base})).warnings == ()
    assert check(plain({"reference": {"path": SHALLOW}})).peak_gib <= one.peak_gib
    far = check(plain({"reference": {"path": other_base}}))
    (said,) = far.warnings
    assert said.startswith("policy and reference stand on two bases, which are both held")
    assert (far.peak_gib - one.peak_gib) * 2**30 == pytest.approx(4 * one.parameters, rel=0.1)


@pytest.mark.parametrize("warmup", [3, 4, 9])
def test_steps_that_are_all_the_critics_are_told_beforehand(plain, warmup):
    warned = (
        f"all 4 steps are the critic's warm-up (critic_warmup={warmup}): the policy learns nothing; lower it, or "
        "give more steps"
    )
    assert check(plain({"critic_warmup": warmup})).warnings == (() if warmup < 4 else (warned,))


def test_warnings_stand_below_what_was_found(plain, other_base, tmp_path):
    app = typer.Typer()
    app.command()(check_command)
    config = plain({"critic_warmup": 4}, {"model.path": other_base})
    (tmp_path / "config.json").write_text(to_json(config))
    file = tmp_path / "mine.py"
    file.write_text(
        "from pathlib import Path\nfrom tuner.config import from_json\n"
        f"config = from_json(Path({str(tmp_path / 'config.json')!r}).read_text())\n"
    )
    *_, plan, rare, note, bases, steps, last = CliRunner().invoke(app, [str(file)]).output.splitlines()
    assert plan.startswith("plan:    4 steps, ")
    assert rare.startswith(
        "note:    sampling.top_p=0.95: what is rarer than the most likely 95% is never sampled"
    )
    assert note.startswith("note:    sampling.top_p=0.95: some tokens cannot be sampled")
    assert bases.startswith("warning: policy and reward model stand on two bases")
    assert steps.startswith("warning: all 4 steps are the critic's warm-up")
    assert last == "ready to train"
    told = json.loads(CliRunner().invoke(app, [str(file), "--json"]).output)
    assert [bases[9:], steps[9:]] == told["warnings"]
    assert [rare[9:], note[9:]] == told["notes"]
    assert told["passes"] is None
    assert "note:" not in CliRunner().invoke(app, [str(file), "sampling.top_p=1.0"]).output
    assert "warning:" not in CliRunner().invoke(app, [str(file), "roles=separate", "critic_warmup=1"]).output


# After the last step


def afters(results: dict[str, Any]) -> dict[str, float]:
    """What results.json says of the end, by the names of the loop's record."""
    found = {f"eval_{name}": results[name]["after"] for name in ("gold", "score")}
    polite = results["conditions"]["polite"]
    found |= {f"eval_{name}/polite": polite[name]["after"] for name in ("gold", "score")}
    return found | {"eval_replay_loss": results["replay"]["after"]}


def evaluated(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.metrics[-1].items() if name.startswith("eval_")}


def test_the_last_measurement_is_taken_once(plain, tmp_path, measurements):
    """Before the first step, at every evaluation, and no more; the last of them is the result."""
    run = tuner.train(plain(MEASURED | {"critic_warmup": 0}), runs=tmp_path)
    assert len(measurements) == 1 + 2
    assert afters(run.results) == evaluated(run)
    assert run.read_json("before") == measurements[0].to_dict()
    assert run.results["replay"]["before"] != run.results["replay"]["after"]


def train_to_the_last_step(config: PPO, runs: Path) -> None:
    """Train in a process that is killed before it writes its model."""

    def killed(*args: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_folder, "save_model", killed)
        with pytest.raises(Killed):
            tuner.train(config, runs=runs)


def test_a_run_killed_behind_its_last_step_measures_it_anew(plain, tmp_path, measurements):
    config = plain(MEASURED | {"max_steps": 2, "critic_warmup": 0})
    train_to_the_last_step(config, tmp_path)
    assert Run(tmp_path / "ppo").results is None
    before, last = measurements
    measurements.clear()
    run = tuner.train(config, runs=tmp_path)
    assert [measurement.to_dict() for measurement in measurements] == [last.to_dict()]
    assert afters(run.results) == evaluated(run)
    assert run.results["gold"]["before"] == before.means["gold"]


def test_a_score_that_is_no_number_leaves_files_that_others_can_read(plain, tmp_path, monkeypatch):
    """Also when the run goes on from them."""
    score = ModelReward.score
    monkeypatch.setattr(ModelReward, "score", lambda *args: score(*args) * np.nan)
    config = plain(MEASURED | {"max_steps": 2})
    for _ in range(2):
        with pytest.raises(DivergedError, match="its last 2 steps were skipped"):
            tuner.train(config, runs=tmp_path)
        before = strict(tmp_path / "ppo" / "before.json")
        assert before["means"]["score"] is before["means"]["score/polite"] is None
        assert 0 < before["means"]["gold"] <= 1
        lines = (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()
        (tmp_path / "last.json").write_text(lines[-1])
        assert strict(tmp_path / "last.json")["eval_score"] is None
    assert Run(tmp_path / "ppo").results is None


def test_losses_of_training_are_not_kept_where_nobody_asks_for_them(plain, small, train):
    """Only validation rows ask: without any, checkpoints would grow with the run."""
    often = {"max_steps": 7, "evaluation.every": 3, "checkpoint.every": 1, "checkpoint.keep": 99}
    runs = [train(small(often), "sft"), train(plain(often | {"prompts_per_step": 2}), "ppo")]
    for run in runs:
        kept = [json.loads(file.read_text()) for file in sorted(run.checkpoints_folder.glob("*/state.json"))]
        assert [len(one["counters"]["losses"]) for one in kept] == [1, 2, 0, 1, 2, 0, 0]


@pytest.mark.parametrize("content", [b"def short(answer, row:\n", "x = 'é'\n".encode("latin1")])
def test_a_rule_in_a_file_that_is_no_python(plain, tmp_path, content):
    (tmp_path / "rules.py").write_bytes(content)
    config = plain(MEASURED | {"evaluation.rule": f"{tmp_path / 'rules.py'}:short"})
    with pytest.raises(UserError, match=r"rules\.py: SyntaxError: .*; correct this file"):
        tuner.train(config, runs=tmp_path / "runs")
    assert not list((tmp_path / "runs").iterdir())


def test_a_reward_model_without_a_chat_template_is_named(plain, start, tmp_path):
    shutil.copytree(start("reward", {"max_steps": 2}).folder, tmp_path / "silent")
    (tmp_path / "silent" / "model" / "chat_template.jinja").unlink()
    config = plain({"reward.path": str(tmp_path / "silent")})
    for refused in (check, lambda config: tuner.train(config, runs=tmp_path / "runs")):
        with pytest.raises(UserError, match="silent: no chat template stands beside this reward model"):
            refused(config)


def test_four_bits_of_another_precision_are_refused_by_check(plain):
    config = plain({"precision": "bf16"}, {"model.quantization": "nf4"})
    with pytest.raises(UserError, match="write precision=fp32"):
        check(config)


def test_the_engine_is_told_of_every_change_of_the_policy_and_of_no_other(tmp_path, monkeypatch):
    """After its updates, not the critic's in the warm-up; and before the first answers of a resumed run."""
    calls: list[str] = []
    generate = LocalEngine.generate

    def generating(self: LocalEngine, *args: Any, **settings: Any) -> Any:
        calls.append("answers")
        return generate(self, *args, **settings)

    monkeypatch.setattr(LocalEngine, "generate", generating)
    monkeypatch.setattr(LocalEngine, "weights_changed", lambda self: calls.append("changed"))
    config = SMALL_PPO.model_copy(update={"policy": Model(path=SHALLOW)})
    rule = {"reward": f"{__file__}:short", "critic_from": "policy", "adapter": {"r": 8}, "replay": None}
    config = override(config, rule | {"max_steps": 3, "checkpoint.every": 1, "checkpoint.keep": 3})
    run = tuner.train(config, runs=tmp_path)
    assert calls == ["answers", "answers", "changed", "answers", "changed"]
    (run.folder / "results.json").unlink()
    shutil.rmtree(run.checkpoints_folder / "step_000003")
    calls.clear()
    tuner.train(config, runs=tmp_path)
    assert calls == ["changed", "answers", "changed"]
