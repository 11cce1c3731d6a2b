"""GRPO and RLOO: killed, split, dealt to processes or rewarded by a rule, a run is the one it would have been."""

import importlib
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tuner
from tests.equivalence.conftest import SHALLOW, SMALL_PPO, in_two_processes, weights
from tests.equivalence.test_ppo import assert_same, records, state, train_and_be_killed
from tuner.algorithms.grpo import GRPO as GRPOAlgorithm
from tuner.algorithms.rloo import RLOO as RLOOAlgorithm
from tuner.config import GRPO, RLOO, PolicyConfig, override
from tuner.errors import UserError
from tuner.losses.policy import group_advantages, leave_one_out
from tuner.stages.run import Run

stage = importlib.import_module("tuner.stages.rl.loop")
ALGORITHMS = {"grpo": GRPOAlgorithm, "rloo": RLOOAlgorithm}
SHARED = {
    "prompts",
    "sampling",
    "replay",
    "tokens_per_pass",
    "precision",
    "gradient_checkpointing",
    "evaluation",
    "optimizer",
}
RICH = {
    "prompts_per_step": 3,
    "answers_per_prompt": 3,
    "mini_batches": 2,
    "update_epochs": 2,
    "kl": 0.1,
    "max_steps": 4,
    "checkpoint.every": 2,
    "checkpoint.keep": 9,
    "evaluation.every": 2,
    "evaluation.rule": f"{__file__}:short",
    "prompts.test_files": [{"path": "tuner:sums/test.jsonl", "condition": "polite", "limit": 4}],
}
UNSCALED: dict[str, dict[str, Any]] = {"grpo": {"scale_advantages": False}, "rloo": {}}
"""Where runs are compared to rounding: a group's standard deviation, which may be next to 0, would divide it."""


def short(answer: str, row: dict[str, Any]) -> float:
    """A rule that any answer has a score by."""
    return 1 / (1 + len(answer))


def length(answer: str, row: dict[str, Any]) -> float:
    """Another rule."""
    return float(len(answer))


def polite(answer: str, row: dict[str, Any]) -> float:
    """A rule for the held-out prompts alone."""
    return {"polite": 0.5}[row["condition"]]


@pytest.fixture(scope="module")
def group(ppo) -> Callable[..., PolicyConfig]:
    """The small PPO run's models and rows under GRPO or RLOO: group("grpo", {"kl": 0})."""

    def config(algorithm: str, changes: dict[str, Any] | None = None) -> PolicyConfig:
        base = ppo({})
        parts = {name: getattr(base, name) for name in SHARED}
        kind = {"grpo": GRPO, "rloo": RLOO}[algorithm]
        # `ppo` as the run's name: the helpers of test_ppo look there
        small = kind(name="ppo", policy=base.policy, adapter=base.adapter, reward=base.reward, **parts)
        return override(small, RICH | (changes or {}))

    return config


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("part", ["estimate", "learn"])
def test_killed_it_goes_on_bit_for_bit(group, tmp_path, algorithm, part):
    whole = tuner.train(group(algorithm), runs=tmp_path / "whole")
    calls = {"estimate": 3, "learn": 3 * RICH["mini_batches"] * RICH["update_epochs"] + 1}
    train_and_be_killed(group(algorithm), tmp_path / "killed", ALGORITHMS[algorithm], part, calls[part])
    assert_same(whole, tuner.train(group(algorithm), runs=tmp_path / "killed"))
    assert [record["prompts"] for record in whole.metrics] == [3] * 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_packing_changes_nothing_but_rounding(group, tmp_path, algorithm):
    """Rows of two passes or of many."""
    whole, split = (
        tuner.train(
            group(algorithm, UNSCALED[algorithm] | {"tokens_per_pass": tokens}), runs=tmp_path / str(tokens)
        )
        for tokens in (1024, 64)
    )
    assert_close(whole, split)


def assert_close(one: Run, other: Run) -> None:
    """Records alike to rounding, which Adam carries on; trained weights alike."""
    for own, their in zip(one.metrics, other.metrics, strict=True):
        rel, absolute = (1e-4, 2e-6) if own["step"] == 1 else (2e-3, 1e-4)
        for name in (
            "loss",
            "policy_loss",
            "kl_loss",
            "kl_coefficient",
            "entropy_loss",
            "ratio",
            "grad_norm",
            "score",
            "reward",
            "kl",
            "eval_gold",
        ):
            assert own.get(name, 0.0) == pytest.approx(their.get(name, 0.0), rel=rel, abs=absolute), (
                own["step"],
                name,
            )
    own_trained, their_trained = (state(run, len(run.metrics))[1] for run in (one, other))
    for name, tensor in own_trained.items():
        assert (tensor - their_trained[name]).norm() <= 2e-3 * tensor.norm() + 1e-4, name


FOLLOWED = {"kl": {"target": 0.1, "horizon": 9, "initial": 0.1}, "entropy_bonus": 0.01}
TRAIN = """
import sys, tuner
from pathlib import Path
from tuner.config import from_json
for name in sys.argv[2:]:
    config = from_json(Path(sys.argv[1], f"{name}.json").read_text())
    tuner.train(config, runs=Path(sys.argv[1], "two", name))
"""


def test_two_processes_equal_one(group, tmp_path):
    """Both algorithms, normalization by answers, and a rule as the reward, in one launch."""
    cases = {
        "grpo": group("grpo", UNSCALED["grpo"]),
        "answers": group("grpo", UNSCALED["grpo"] | {"normalization": "answer", "clip_high": 0.3} | FOLLOWED),
        "rloo": group("rloo"),
        "rule": group("rloo", {"reward": {"function": f"{__file__}:short"}}),
    }
    in_two_processes(tmp_path, cases, TRAIN, {"TUNER_CACHE": str(tmp_path / "cache")})
    for name, config in cases.items():
        one = tuner.train(config, runs=tmp_path / "one" / name)
        two = Run(tmp_path / "two" / name / config.name)
        assert two.read_json("versions")["processes"] == 2
        assert_close(one, two)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_rule_is_a_reward(group, tmp_path, algorithm, monkeypatch):
    prepared, prepare = [], stage.prepare

    def preparing(*arguments: Any) -> Any:
        prepared.append(prepare(*arguments))
        return prepared[-1]

    monkeypatch.setattr(stage, "prepare", preparing)
    config = group(algorithm, {"reward": {"function": f"{__file__}:short"}, "max_steps": 2})
    run = tuner.train(config, runs=tmp_path)
    assert "reward" not in prepared[0].roles
    assert "critic" not in prepared[0].roles
    for record in run.metrics:
        assert 0 < record["score"] <= 1
    assert run.results["score"]["after"] == pytest.approx(run.results["gold"]["after"])


def test_a_rule_may_be_for_held_out_prompts_alone(group, tmp_path):
    changes = {"max_steps": 1, "evaluation.rule": f"{__file__}:polite"}
    with pytest.raises(UserError, match=r"train\.jsonl:\d+: .*rule_on_rollouts=False.* failed on .*KeyError"):
        tuner.train(
            group("rloo", changes | {"prompts.files": ["tuner:sums/train.jsonl"]}), runs=tmp_path / "all"
        )
    run = tuner.train(group("rloo", changes | {"evaluation.rule_on_rollouts": False}), runs=tmp_path)
    assert run.results["gold"]["after"] == 0.5
    assert not {"gold", "gold_top_tenth", "gold_auc"} & run.metrics[0].keys()


def lines_of(run: Run) -> list[str]:
    return (run.folder / "rollouts.jsonl").read_text().splitlines()


def test_rules_are_added_to_the_rewards_score(group, tmp_path):
    """Of two runs of one step, which sample alike, one adds a rule twice: with weight 2, and by another name."""
    alone = {"max_steps": 1, "evaluation.recorded_answers": None}
    added = [{"function": f"{__file__}:short", "weight": 2.0}, f"{__file__}:length"]
    plain, both = (
        tuner.train(group("rloo", alone | changes), runs=tmp_path / str(len(changes)))
        for changes in ({}, {"added_rewards": added})
    )
    (before,), (after,) = plain.metrics, both.metrics
    numbers = [json.loads(line)["prompt_number"] for line in lines_of(both)]
    assert numbers == [number for number in numbers[::3] for _ in range(3)], "three answers to a prompt"
    answers, again = ([json.loads(line)["answer"] for line in lines_of(run)] for run in (plain, both))
    assert answers == again
    parts = [
        before["score"],
        2 * np.mean([short(answer, {}) for answer in answers]),
        np.mean([*map(len, answers)]),
    ]
    for name, part in zip(("reward", "short", "length"), parts, strict=True):
        assert after[f"score_of/{name}"] == pytest.approx(part, rel=1e-6)
    assert after["score"] == pytest.approx(sum(parts), rel=1e-6)
    assert "score_of/reward" not in before
    gold, score = (both.results[name]["before"] for name in ("gold", "score"))
    assert score > plain.results["score"]["before"] + 2 * gold, (
        "held-out answers are scored by all parts, too"
    )


def test_without_kl_no_reference_is_held(group, tmp_path):
    run = tuner.train(group("grpo", {"kl": 0.0, "max_steps": 2}), runs=tmp_path / "none")
    assert all("kl" not in record and "kl_loss" not in record for record in run.metrics)
    assert math.isfinite(run.metrics[-1]["loss"])
    named = {"kl": 0.0, "max_steps": 1, "reference": {"path": SHALLOW}}
    (record,) = tuner.train(group("grpo", named), runs=tmp_path / "named").metrics
    assert record["kl"] > 0.1, "the policy has left the base that it was trained from"
    assert "kl_loss" not in record


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_advantages_are_relative_to_the_answers_of_the_same_prompt(group, tmp_path, algorithm, monkeypatch):
    """By hand from the scores: groups are consecutive answers, and every token has its answer's advantage."""
    seen: list[Any] = []
    kind = ALGORITHMS[algorithm]
    estimate = kind.estimate

    def estimating(self: Any, rewarded: Any, rewards_A: np.ndarray, devices: Any) -> Any:
        experiences = estimate(self, rewarded, rewards_A, devices)
        seen.append((rewards_A.copy(), experiences))
        return experiences

    monkeypatch.setattr(kind, "estimate", estimating)
    tuner.train(group(algorithm, {"max_steps": 2}), runs=tmp_path)
    for rewards_A, experiences in seen:
        expected = (
            group_advantages(rewards_A, 3, True) if algorithm == "grpo" else leave_one_out(rewards_A, 3)
        )
        for group_start in range(0, len(rewards_A), 3):
            assert expected[group_start : group_start + 3].sum() == pytest.approx(0, abs=1e-9)
        for row in experiences:
            for place, answer in enumerate(row.row.answers.tolist()):
                own = row.advantages_N[row.row.borders[place] : row.row.borders[place + 1]]
                assert torch.allclose(own, torch.tensor(expected[answer], dtype=torch.float32))


CHANGES = {
    "answers": ("grpo", {"answers_per_prompt": 2}),
    "scale": ("grpo", {"scale_advantages": False}),
    "normalization": ("grpo", {"normalization": "answer"}),
    "clip": ("grpo", {"clip": 1e-4, "clip_high": 1e-3}),
    "clip_high": ("grpo", {"clip": 1e-4, "clip_high": 1.0}),
    "kl": ("grpo", {"kl": 1.0}),
    "kl_estimator": ("grpo", {"kl": 1.0, "kl_estimator": "k2"}),
    "rloo answers": ("rloo", {"answers_per_prompt": 2}),
}
LEARNING = {"optimizer.lr": 1e-2, "max_steps": 2, "evaluation.rule": None}


def test_every_field_changes_the_run(group, tmp_path):
    """What each field of the group algorithms decides is seen in the records of two steps of several updates."""
    plain = {name: tuner.train(group(name, LEARNING), runs=tmp_path / name) for name in ALGORITHMS}
    changed = {
        name: tuner.train(group(algorithm, LEARNING | changes), runs=tmp_path / name.replace(" ", "_"))
        for name, (algorithm, changes) in CHANGES.items()
    }
    for name, (algorithm, _) in CHANGES.items():
        assert records(changed[name]) != records(plain[algorithm]), name
    assert records(changed["clip"]) != records(changed["clip_high"])
    assert records(changed["kl"]) != records(changed["kl_estimator"])


def test_twice_is_the_same_and_another_seed_another(group, tmp_path):
    one, two = (tuner.train(group("grpo", {"max_steps": 2}), runs=tmp_path / place) for place in ("a", "b"))
    assert records(one) == records(two)
    assert all(torch.equal(tensor, weights(two)[name]) for name, tensor in weights(one).items())
    other = tuner.train(group("grpo", {"max_steps": 2, "seed": 1}), runs=tmp_path / "c")
    assert records(other) != records(one)


assert SMALL_PPO.name == "ppo"
