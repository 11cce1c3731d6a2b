"""Runs whose answers come from a server: resumed bit for bit from stored rollouts, corrected, or stopped in words."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import equal

import tuner
from tests.equivalence.conftest import SHALLOW, SMALL_PPO, in_two_processes
from tests.unit.rollout.vllm_stand_in import StandIn
from tuner.config import GRPO, RLOO, Model, PolicyConfig, override
from tuner.errors import UserError
from tuner.rollout import vllm_server
from tuner.stages.check import check
from tuner.stages.run import Run

UNSTEADY = {"seconds", "tokens_per_second", "memory_gib"}
BOUNDLESS = {"engine.max_gap": 100.0}


def short(answer: str, row: dict[str, Any]) -> float:
    return 1 / (1 + len(answer))


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture
def config(stand_in) -> Iterator[Callable[..., PolicyConfig]]:
    """A small config of an algorithm whose engine is the stand-in, some leaves changed."""
    shared = {
        name: getattr(SMALL_PPO, name)
        for name in ("prompts", "sampling", "precision", "gradient_checkpointing", "optimizer", "evaluation")
    }
    with stand_in.serving() as url:

        def made(kind: str, changes: dict[str, Any] | None = None) -> PolicyConfig:
            base: PolicyConfig = SMALL_PPO.model_copy(update={"policy": Model(path=SHALLOW)})
            rule = {"reward": f"{__file__}:short"}
            if kind == "ppo":
                base = override(base, {**rule, "critic_from": "policy", "replay": None})
            else:
                group: Any = {"grpo": GRPO, "rloo": RLOO}[kind]
                base = group(
                    name=kind,
                    policy=Model(path=SHALLOW),
                    **rule,
                    **shared,
                    answers_per_prompt=3,
                )
            steps = {
                "adapter": {"r": 4},
                "max_steps": 3,
                "prompts_per_step": 3,
                "checkpoint.every": 1,
                "checkpoint.keep": 3,
            }
            return override(base, {**steps, "engine": {"url": url, "retries": 0}, **(changes or {})})

        yield made


def steady(run: Run) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name.partition("/")[0] not in UNSTEADY}
        for record in run.metrics
    ]


def rewound(run: Run, step: int) -> None:
    """The run as it was left by a kill after the checkpoint of a step."""
    for result in ("results.json", "model"):
        place = run.folder / result
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    for checkpoint in run.checkpoints_folder.iterdir():
        if int(checkpoint.name.rpartition("_")[2]) > step:
            shutil.rmtree(checkpoint)


def test_a_resumed_run_learns_from_the_same_answers(config, stand_in, tmp_path):
    """Bit for bit, held-out measures too, though the server answers nothing twice alike: it is not asked again."""
    held_out = {
        "prompts.test_files": [{"path": "tuner:sums/test.jsonl", "limit": 3}],
        "evaluation.every": 1,
        "evaluation.temperature": 1.0,
    }
    whole = config("ppo", {**BOUNDLESS, **held_out, "max_steps": 2})
    run = tuner.train(whole, runs=tmp_path)
    before, weights = steady(run), load_file(run.model_folder / "adapter_model.safetensors")
    results, asked = run.results, len(stand_in.completions)
    assert all(record["generator_gap_max"] >= record["generator_gap"] > 0.1 for record in before)
    rewound(run, 1)
    run = tuner.train(whole, runs=tmp_path)
    assert steady(run) == before
    assert run.results == results
    after = load_file(run.model_folder / "adapter_model.safetensors")
    assert all(equal(weight, after[name]) for name, weight in weights.items())
    assert len(stand_in.completions) == asked


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo"])
def test_a_gap_above_the_bound_is_corrected_by_truncated_weights(config, tmp_path, kind):
    """Of the same rollout, whose log-probabilities are wrong, another gradient is taken; the gap is what it was."""
    settings = {"max_steps": 1, "checkpoint.every": None} | ({"critic_warmup": 0} if kind == "ppo" else {})
    run = tuner.train(config(kind, {**settings, "engine.max_weight": 1.5}), runs=tmp_path)
    (record,) = run.metrics
    assert record["generator_gap"] > 0.05
    assert 0 < record["importance_weight"] <= 1.5
    assert (run.folder / "log.txt").read_text().count("have truncated importance weights") == 1
    shutil.copytree(run.folder / "answers", tmp_path / "other" / kind / "answers")
    (other,) = tuner.train(config(kind, {**settings, **BOUNDLESS}), runs=tmp_path / "other").metrics
    assert "importance_weight" not in other
    assert other["generator_gap"] == record["generator_gap"]
    norm = "grad_norm_policy" if kind == "ppo" else "grad_norm"
    assert other[norm] != pytest.approx(record[norm], rel=0.01)


def test_a_gap_above_the_bound_stops_the_run_which_goes_on_from_the_same_answers(config, stand_in, tmp_path):
    """Also at the first step, before which there is no checkpoint."""
    stopping = config("grpo", {"engine.above_max_gap": "stop", "max_steps": 1})
    words = r'nats per token, above engine.max_gap=0.05: .* engine.above_max_gap="truncate"'
    with pytest.raises(UserError, match=words):
        tuner.train(stopping, runs=tmp_path)
    asked = len(stand_in.completions)
    (record,) = tuner.train(override(stopping, {"engine.above_max_gap": "truncate"}), runs=tmp_path).metrics
    assert record["importance_weight"] > 0
    assert len(stand_in.completions) == asked


def test_two_processes_correct_as_one_does(config, stand_in, tmp_path):
    """From the same rollouts: the main process asks, all get the answers, and a gap is measured over all ranks."""
    two = config("ppo", {"critic_warmup": 0, "max_steps": 2, "checkpoint.every": None})
    run = tuner.train(two, runs=tmp_path / "one")
    asked = len(stand_in.completions)
    shutil.copytree(run.folder / "answers", tmp_path / "two" / "small" / "ppo" / "answers")
    in_two_processes(tmp_path, {"small": two})
    assert len(stand_in.completions) == asked
    for record, other in zip(run.metrics, Run(tmp_path / "two" / "small" / "ppo").metrics, strict=True):
        assert other["generator_gap_max"] == record["generator_gap_max"]
        for name in ("generator_gap", "importance_weight", "policy_loss", "grad_norm_policy"):
            assert other[name] == pytest.approx(record[name], rel=1e-3), name


def test_check_says_what_the_engine_needs(config, tmp_path, monkeypatch):
    notes = check(config("ppo")).notes
    assert any(f"serve-rollouts {SHALLOW} --max-lora-rank 8 --precision fp32" in note for note in notes)
    monkeypatch.delenv(vllm_server.PYTHON, raising=False)
    monkeypatch.chdir(tmp_path)
    own = {"engine": {"url": None}}
    with pytest.raises(UserError, match=r"no python of vLLM's environment there; `make vllm` makes it"):
        check(config("ppo", own))
    monkeypatch.setenv(vllm_server.PYTHON, str(Path(shutil.which("python3") or "")))
    assert any("writes its base" in note for note in check(config("ppo", own)).notes)
    assert any(
        "restart of the server" in note
        for note in check(config("ppo", {**own, "adapter": None, "roles": "separate"})).notes
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": None, "roles": "separate"}, "leave url out, or add adapter"),
        ({"adapter.train_whole": ["embed_tokens"], "roles": "separate"}, "modules that are trained whole"),
        ({"adapter.r": 600}, "rank 600 is more than vLLM loads"),
        ({"sampling.temperature": 0.7}, "write temperature=1.0, or top_p=1.0"),
    ],
)
def test_what_no_server_can_do_is_refused_before_the_run(config, changes, words):
    with pytest.raises(UserError, match=words):
        check(config("ppo", changes))
