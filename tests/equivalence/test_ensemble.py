"""PPO rewarded by two reward models and by comparison with the reference: killed, shared out, and by another route."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tuner
from tests.equivalence.conftest import in_two_processes
from tests.equivalence.test_ppo import assert_close, assert_same, shown, train_and_be_killed
from tuner.algorithms.ppo import PPO as Algorithm
from tuner.config import PPO, override
from tuner.data.conversation import Prompt, Turn
from tuner.errors import UserError
from tuner.rollout.shaping import preferences
from tuner.stages.check import check
from tuner.stages.rl.evaluate import find_reward, load_reward
from tuner.stages.run import Run
from tuner.training.devices import Devices

MEASURED = {"max_steps": 2, "data.limit": 24, "data.split": {"test": 0.25}}
"""A reward model that records the mean and deviation of its scores."""
BOTH = {
    "prompts_per_step": 4,
    "critic_warmup": 0,
    "max_steps": 3,
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
    "mini_batches": 2,
    "replay": None,
    "reward_clip": None,
    "normalize_rewards": False,
    "preference_reward": {"answers": 2},
    "missing_end_penalty": 0.5,
    "combine": "mean_minus_variance",
    "variance_coefficient": 0.5,
    "evaluation.recorded_answers": None,
}


@pytest.fixture(scope="module")
def both(ppo, start) -> Callable[..., PPO]:
    """The small PPO run with two reward models on the policy's base."""
    second = start("reward", MEASURED | {"seed": 1})

    def made(changes: dict[str, Any] | None = None, reward: dict[str, Any] | None = None) -> PPO:
        config = ppo(BOTH, reward=reward or MEASURED)
        config = override(config, {"further_rewards": [{"path": str(second.folder)}]})
        return override(config, changes or {})

    return made


def test_the_record_is_that_of_both_reward_models(both, tmp_path, monkeypatch):
    compared: list[tuple[np.ndarray, np.ndarray]] = []

    def comparing(scores_A: np.ndarray, references_AM: np.ndarray, settings: Any) -> np.ndarray:
        compared.append((scores_A, references_AM))
        return preferences(scores_A, references_AM, settings)

    monkeypatch.setattr("tuner.stages.rl.prepare.preferences", comparing)
    config = both({"max_steps": 2})
    run = tuner.train(config, runs=tmp_path)
    assert_the_record_is_true(run, compared)
    assert_evaluation_scores_alike(config, run)


def test_killed_it_goes_on_bit_for_bit(both, tmp_path):
    whole = tuner.train(both(), runs=tmp_path / "whole")
    in_the_last_step = 2 * BOTH["mini_batches"] + 1
    train_and_be_killed(both(), tmp_path / "killed", Algorithm, "_learn_values", in_the_last_step)
    assert_same(whole, tuner.train(both(), runs=tmp_path / "killed"))


def assert_the_record_is_true(run: Run, compared: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for record, (scores_A, references_AM) in zip(run.metrics, compared, strict=True):
        rows = [row for row in shown(run) if row["step"] == record["step"]]
        models_KA = np.array([row["scores"] for row in rows]).T
        assert models_KA.shape == (2, 4)
        expected_A = models_KA.mean(axis=0) - 0.5 * models_KA.var(axis=0)
        assert [row["score"] for row in rows] == pytest.approx(expected_A.tolist(), rel=1e-12)
        assert record["disagreement"] == pytest.approx(models_KA.std(axis=0).mean(), rel=1e-12)
        penalties_A = 0.5 * np.array([not row["ended"] for row in rows])
        assert scores_A.tolist() == pytest.approx((expected_A - penalties_A).tolist(), rel=1e-12)
        assert references_AM.shape == (4, 2)
        assert (references_AM[:, 0] != references_AM[:, 1]).any()  # answers of their own
        assert record["reference_score"] >= references_AM.mean()  # which has penalties
        assert record["seconds/references"] > 0
    # policy and reference are one model in the first step, and do not give the same answers
    scores_A, references_AM = compared[0]
    assert (scores_A[:, None] != references_AM).any(axis=1).all()
    first = run.metrics[0]
    assert first["kl"] == 0
    assert first["reward"] == pytest.approx(
        (1 / (1 + np.exp(references_AM - scores_A[:, None]))).mean(), rel=1e-6
    )


def assert_evaluation_scores_alike(config: PPO, run: Run) -> None:
    """`tuner eval` scores with the reward models alone, on one base, when the policy has gone from memory."""
    devices = Devices.of(config)
    reward = load_reward(config, devices, find_reward(config, devices))
    rows = [row for row in shown(run) if row["step"] == 1]
    prompts = [
        Prompt(
            tuple(Turn(turn["role"], turn["content"]) for turn in row["prompt"]),
            condition=row["condition"],
            origin=row["origin"],
        )
        for row in rows
    ]
    scores = reward.score(prompts, [row["answer"] for row in rows])
    assert scores.tolist() == pytest.approx([row["score"] for row in rows], rel=1e-3, abs=1e-4)


def test_two_processes_equal_one(both, tmp_path):
    config = both()
    in_two_processes(tmp_path, {"both": config}, env={"TUNER_CACHE": str(tmp_path / "cache")})
    one, two = tuner.train(config, runs=tmp_path / "one"), Run(tmp_path / "two" / "both" / "ppo")
    for run in (one, two):
        (run.folder / "rollouts.jsonl").write_text(
            "".join(json.dumps(row | {"scores": None}) + "\n" for row in shown(run))
        )
    assert_close(one, two)
    for own, their in zip(one.metrics, two.metrics, strict=True):
        for name in ("disagreement", "reference_score"):
            assert own[name] == pytest.approx(their[name], rel=2e-3, abs=1e-4)


def test_what_an_ensemble_costs_and_what_it_refuses(both, start, tmp_path):
    single = check(both({"further_rewards": []}))
    shared = check(both())
    assert shared.warnings == ()
    assert 0 < (shared.peak_gib - single.peak_gib) < single.peak_gib / 10  # an adapter and a head
    far = start("reward", MEASURED | {"adapter": None, "optimizer.lr": 2e-3})
    apart = check(both({"further_rewards": [{"path": str(far.folder)}]}))
    (warning,) = apart.warnings
    assert f"policy and the further reward model {far.folder} stand on two bases" in warning
    assert apart.peak_gib > shared.peak_gib
    unmeasured = shutil.copytree(start("reward", MEASURED).folder, tmp_path / "unmeasured")
    record = unmeasured / "model" / "reward.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"reference": None}))
    with pytest.raises(UserError, match=f"{unmeasured}: no mean and standard deviation"):
        check(both({"further_rewards": [{"path": str(unmeasured)}]}))
    with pytest.raises(UserError, match="reward_clip=None and normalize_rewards=False"):
        both({"normalize_rewards": True})
    with pytest.raises(UserError, match="add the rule by added_rewards"):
        both({"reward": f"{__file__}:rule", "critic_from": "policy"})
