"""PPO: a run that is killed, split or shared out is the run it would have been, and its record is true.

What the record says is worked out again by another route: transformers' and peft's own models, one answer at a
time, and sums written as loops.
"""

import importlib
import io
import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tuner
from tests.equivalence.conftest import SHALLOW, in_two_processes, weights
from tests.forked import exit_code, fork
from tuner.algorithms.ppo import PPO as Algorithm
from tuner.config import PPO, override
from tuner.data.load_examples import load_examples
from tuner.errors import UserError
from tuner.evaluation.held_out_policy import HeldOutPolicy
from tuner.models.forward import token_logprobs
from tuner.models.scorer import ScoreRequest, open_scorer
from tuner.models.tokenizer import read_tokenizer
from tuner.resources import locate
from tuner.rollout.reward_sources import ModelReward
from tuner.stages.reward.score_file import score_file
from tuner.stages.run import Run
from tuner.training.step import Step
from tuner.training.stop_signals import Interrupted

stage = importlib.import_module("tuner.stages.rl.loop")
preparing = importlib.import_module("tuner.stages.rl.prepare")
losses = importlib.import_module("tuner.algorithms.ppo")
CPU = torch.device("cpu")
NF4 = {"model.quantization": "nf4", "precision": "bf16"}
FULL = {"adapter": None, "optimizer.lr": 2e-3}
SPENT = ("seconds", "tokens_per_second", "memory_gib")
TEN = {"path": "tuner:sums/test.jsonl", "condition": "polite", "limit": 6}
RICH = {
    "prompts_per_step": 4,
    "mini_batches": 2,
    "update_epochs": 2,
    "whiten_advantages": True,
    "critic_warmup": 2,
    "max_steps": 5,
    "checkpoint.every": 2,
    "checkpoint.keep": 9,
    "prompts.test_files": [TEN],
    "replay.test_files": [{"path": "tuner:sums/test.jsonl", "limit": 4}],
    "evaluation.every": 2,
    "evaluation.samples": 2,
    "evaluation.recorded_answers": 2,
    "evaluation.rule": f"{__file__}:gold",
}
"""Everything that has a state, in steps as small as can be: the boundary of the warm-up is a checkpoint."""


def gold(answer: str, row: dict[str, Any]) -> float:
    """A rule that is right about sums."""
    right = row["messages"][-1]["content"]
    return float(answer.strip() == right) / 2 + 0.25


def lengthy(answer: str, row: dict[str, Any]) -> float:
    """A rule that tells any two answers apart."""
    return 1 - 1 / (1 + len(answer))


class Watched:
    """What the steps made beside their records, by step (0-based), of the runs since the last `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.made: Any = None
        self.rollouts: dict[int, Any] = {}
        self.scores: dict[int, np.ndarray] = {}
        self.seen: dict[int, Any] = {}
        self.policy: list[tuple[Any, ...]] = []
        """Arguments of every policy loss."""
        self.values: list[tuple[Any, ...]] = []
        self.step = 0

    @property
    def answers(self) -> dict[int, list[list[int]]]:
        return {
            step: [answer.tokens.tolist() for answer in rollout.answers]
            for step, rollout in self.rollouts.items()
        }


@pytest.fixture
def watched(monkeypatch) -> Watched:
    found = Watched()

    def watch(place: Any, name: str, note: Callable[..., None]) -> None:
        original = getattr(place, name)

        def watching(*args: Any, **settings: Any) -> Any:
            result = original(*args, **settings)
            note(result, *args, **settings)
            return result

        monkeypatch.setattr(place, name, watching)

    def answered(rollout: Any, *_: Any, step: int, **__: Any) -> None:
        found.step = step
        found.rollouts[step] = rollout

    def scored(figures: Any, rollout: Any, scores_A: np.ndarray, *_: Any) -> None:
        found.scores[found.step] = scores_A

    def experienced(means: Any, rollout: Any, experiences: Any, *_: Any) -> None:
        found.seen[found.step] = experiences

    watch(stage, "answer_prompts", answered)
    watch(stage, "rollout_figures", scored)
    watch(stage, "token_means", experienced)
    watch(stage, "prepare", lambda made, *args: setattr(found, "made", made))
    watch(losses, "policy_loss", lambda sums, *args, **_: found.policy.append((found.step, *args)))
    watch(losses, "value_loss", lambda loss, *args: found.values.append((found.step, *args)))
    return found


def records(run: Run) -> list[dict[str, Any]]:
    """A run's record without times and memory."""
    return [
        {name: value for name, value in record.items() if name.split("/")[0] not in SPENT}
        for record in run.metrics
    ]


def shown(run: Run) -> list[dict[str, Any]]:
    """Answers of the rollouts, as the run's file has them."""
    file = run.folder / "rollouts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def state(run: Run, step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A checkpoint's counters with the rest of the optimiser, its trained weights, the optimiser's tensors."""
    folder = run.checkpoints_folder / f"step_{step:06d}"
    kept = json.loads((folder / "state.json").read_text())
    kept.pop("random")  # no part of PPO draws from a generator that has a state
    kept.pop("files"), kept.pop("sha256")  # hashes, of that too
    tensors = [load_file(folder / f"{name}.safetensors") for name in ("trained", "optimizer")]
    return kept, tensors[0], tensors[1]


def assert_same(one: Run, other: Run) -> None:
    """To the last bit: records, answers, samples, results, the model, and all that the last checkpoint holds."""
    assert records(one) == records(other)
    assert shown(one) == shown(other)
    assert one.samples == other.samples
    assert one.results == other.results
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())
    last = len(one.metrics)
    (kept, *tensors), (their_kept, *their_tensors) = state(one, last), state(other, last)
    assert kept == their_kept
    for own, their in zip(tensors, their_tensors, strict=True):
        assert own.keys() == their.keys()
        assert all(torch.equal(tensor, their[name]) for name, tensor in own.items())


CLOSE = (
    *("loss", "policy_loss", "value_loss", "replay_loss", "ratio", "clipped", "grad_norm_policy"),
    *("grad_norm_critic", "score", "reward", "kl", "kl_k3", "entropy", "value", "explained_variance"),
    *("score/brief", "reward/brief", "eval_score", "eval_gold", "eval_replay_loss"),
    *("score_std", "score_min", "score_max", "score_length_correlation", "kl_per_answer", "kl_coefficient"),
    "entropy_loss",
)
EXACT = (
    *(
        "gold",
        "gold/brief",
        "gold_top_tenth",
        "step",
        "tokens",
        "length",
        "ended",
        "repetition",
        "prompts",
        "epoch",
    ),
    *("lr_policy", "lr_critic"),
)


def assert_close(one: Run, other: Run) -> None:
    """The same answers; numbers to rounding, later ones as far as Adam carries a rounding on."""
    for own, their in zip(one.metrics, other.metrics, strict=True):
        assert {name: own.get(name) for name in EXACT} == {name: their.get(name) for name in EXACT}
        assert {name for name in CLOSE if name in own} == {name for name in CLOSE if name in their}
        rel, absolute = (1e-4, 2e-6) if own["step"] == 1 else (2e-3, 1e-4)
        for name in (name for name in CLOSE if name in own):
            here, there = (math.nan if one[name] is None else one[name] for one in (own, their))
            assert here == pytest.approx(there, rel=rel, abs=absolute, nan_ok=True), (own["step"], name)
    for own, their in zip(shown(one), shown(other), strict=True):
        assert own.pop("score") == pytest.approx(their.pop("score"), rel=2e-3, abs=1e-4)
        assert own == their
    own_trained, their_trained = (state(run, len(run.metrics))[1] for run in (one, other))
    assert own_trained.keys() == their_trained.keys()
    for name, tensor in own_trained.items():
        assert (tensor - their_trained[name]).norm() <= 2e-3 * tensor.norm() + 1e-4, name


# Killed


def kill_in(place: Any, name: str, call: int) -> None:
    """Have this process killed when a function has been called so many times before, its work done."""
    original, calls = getattr(place, name), iter(range(10_000))

    def killing(*args: Any, **settings: Any) -> Any:
        result = original(*args, **settings)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, killing)


def train_and_be_killed(config: PPO, runs: Path, *where: Any) -> Run:
    """Train in a process that is killed (SIGKILL) on its way; the folder that it leaves."""

    def train() -> None:
        kill_in(*where)
        tuner.train(config, runs=runs)

    assert exit_code(fork(train)) == -signal.SIGKILL
    run = Run(runs / "ppo")
    assert run.results is None
    return run


@pytest.fixture(scope="module")
def whole(ppo, tmp_path_factory) -> tuple[Run, dict[int, Any]]:
    """The rich run that nothing befell, and its answers."""
    with pytest.MonkeyPatch.context() as patch:
        found: dict[int, Any] = {}
        answer = stage.answer_prompts

        def answering(*args: Any, step: int, **settings: Any) -> Any:
            rollout = answer(*args, step=step, **settings)
            found[step] = [answer.tokens.tolist() for answer in rollout.answers]
            return rollout

        patch.setattr(stage, "answer_prompts", answering)
        run = tuner.train(ppo(RICH), runs=tmp_path_factory.mktemp("whole"))
    return run, found


UPDATES = RICH["mini_batches"] * RICH["update_epochs"]
KILLS = {
    "generate": (stage, "answer_prompts", 3),
    "logprobs": (Algorithm, "observe", 3),
    "scores": (preparing, "shape_scores", 3),
    "rewards": (Algorithm, "reward", 3),
    "advantages": (Algorithm, "estimate", 3),
    "updates": (Algorithm, "_learn_values", 3 * UPDATES + 1),
    "the policy's update": (Algorithm, "_learn_policy", UPDATES + 2),
    "the critic's warm-up": (Algorithm, "_learn_values", 1 * UPDATES + 1),
    "the first step after it": (Algorithm, "_learn_policy", 0),
    "the last step": (stage, "rollout_figures", 4),
    "an evaluation": (HeldOutPolicy, "metrics", 1),
    "the measurement before": (HeldOutPolicy, "measure", 0),
    "the end": (importlib.import_module("tuner.stages.model_folder"), "save_model", 0),
}
"""Part -> the function in whose call (counted from 0) the process dies; of a step 3 that goes on from step 2."""


@pytest.mark.parametrize("part", KILLS)
def test_killed_in_every_part(ppo, tmp_path, whole, watched, part):
    run, answers = whole
    left = train_and_be_killed(ppo(RICH), tmp_path, *KILLS[part])
    begun = {"the critic's warm-up": 0, "the measurement before": 0, "the last step": 4, "the end": 5}
    saved = sorted(path.name for path in left.checkpoints_folder.glob("step_*"))
    assert saved[-1:] <= [f"step_{begun.get(part, 2):06d}"]  # perhaps the writer was killed too
    resumed = tuner.train(ppo(RICH), runs=tmp_path)
    assert_same(run, resumed)
    assert watched.answers.items() <= answers.items()


KNOBS = {
    "prompts_per_step": 4,
    "mini_batches": 2,
    "critic_warmup": 1,
    "max_steps": 4,
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
    "reference": {"path": SHALLOW},
    "kl": {"target": 1.0, "horizon": 8, "initial": 0.1},
    "entropy_bonus": 0.01,
    "value_gae_lambda": 1.0,
    "value_clip": 0.2,
    "critic_updates": 2,
    "whiten_advantages": True,
    "mask_truncated": True,
    "length_penalty": {"per_token": 0.01},
    "sampling.top_k": 50,
    "sampling.min_new_tokens": 2,
    "added_rewards": [f"{__file__}:length"],
    "prompts.test_files": [],
}
"""The knobs that `whole` leaves alone, all at once."""


def length(answer: str, row: dict[str, Any]) -> float:
    """A rule to add to the reward."""
    return len(answer) / 100


def test_killed_with_all_knobs_on(ppo, tmp_path):
    """The coefficient is part of the state: it waits for the warm-up to end, follows its target, and is restored."""
    config = ppo(KNOBS)
    whole = tuner.train(config, runs=tmp_path / "whole")
    in_the_last_step = 3 * KNOBS["mini_batches"] + 1
    train_and_be_killed(config, tmp_path / "killed", Algorithm, "learn", in_the_last_step)
    assert_same(whole, tuner.train(config, runs=tmp_path / "killed"))
    coefficients = [record["kl_coefficient"] for record in whole.metrics]
    assert coefficients[:2] == [0.1, 0.1]
    for before, after, record in zip(coefficients[1:], coefficients[2:], whole.metrics[1:], strict=False):
        error = max(-0.2, min(0.2, record["kl_per_answer"] - 1.0))
        assert after == pytest.approx(before * (1 + error * 4 / 8), rel=1e-12)
        assert after != before
    last = whole.metrics[-1]
    assert last["kl_per_answer"] == pytest.approx(last["kl"] * last["length"], rel=1e-9)
    assert last["score_min"] <= last["score"] <= last["score_max"]


def test_a_reference_that_is_the_start_changes_nothing(ppo, tmp_path):
    """Named or not, loaded from its folder or copied in memory, it is the same policy to the last bit."""
    config = ppo({"max_steps": 2})
    plain = tuner.train(config, runs=tmp_path / "plain")
    named = tuner.train(
        override(config, {"reference": {"path": config.policy.path}}), runs=tmp_path / "named"
    )
    assert records(plain) == records(named)
    assert all(torch.equal(tensor, weights(named)[name]) for name, tensor in weights(plain).items())
    pinned, policy = (named.read_json(name) for name in ("reference", "policy"))
    assert pinned is not None
    assert pinned == policy
    assert plain.read_json("reference") is None


def test_killed_again_and_again(ppo, tmp_path, whole):
    """Each time a little farther on: checkpoints of runs that went on are as good."""
    for part in ("the critic's warm-up", "logprobs"):
        train_and_be_killed(ppo(RICH), tmp_path, *KILLS[part])
    train_and_be_killed(ppo(RICH), tmp_path, Algorithm, "_learn_policy", UPDATES + 1)
    assert_same(whole[0], tuner.train(ppo(RICH), runs=tmp_path))


STOPS = {
    "generate": (stage, "answer_prompts", 2, 2),
    "rewards": (Algorithm, "reward", 0, 2),
    "updates": (Algorithm, "_learn_policy", 0, 3),
}
"""Part -> the function in whose call SIGTERM comes, of a run or of a run that goes on; and the step that is saved."""


def test_asked_to_stop_the_run_ends_between_parts(ppo, tmp_path, whole, monkeypatch):
    """A step that has updated nothing is taken again, one that has is finished."""
    for place, name, call, step in STOPS.values():
        original, calls = getattr(place, name), itertools.count()

        def stopped(
            *args: Any, original: Any = original, calls: Any = calls, call: int = call, **settings: Any
        ) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, stopped)
            with pytest.raises(Interrupted, match=f"stopped by SIGTERM after step {step}, saved"):
                tuner.train(ppo(RICH), runs=tmp_path)
    assert_same(whole[0], tuner.train(ppo(RICH), runs=tmp_path))


KINDS: dict[str, dict[str, Any]] = {
    "nf4-8bit-paged": {
        "changes": {"optimizer.bits": 8, "optimizer.paged": True, "precision": "bf16"},
        "sft": NF4,
        "reward": NF4,
    },
    "separate": {"changes": {"roles": "separate"}},
    "all-weights": {"changes": {"roles": "separate", "optimizer.lr": 1e-4}, "sft": FULL, "reward": FULL},
    "two-bases": {"changes": {"precision": "bf16"}, "sft": NF4, "reward": FULL},
    "critic-from-policy": {"changes": {"critic_from": "policy"}},
    "fresh-adapter": {
        "changes": {"adapter": {"r": 4, "alpha": 8}, "roles": "separate", "critic_adapter": {"r": 4}},
        "sft": FULL,
        "reward": FULL,
    },
}


def of_kind(ppo: Callable[..., PPO], kind: str, changes: dict[str, Any] | None = None) -> PPO:
    given = KINDS[kind]
    return ppo(given["changes"] | (changes or {}), given.get("sft"), given.get("reward"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_state_is_restored(ppo, tmp_path, kind):
    config = of_kind(ppo, kind, {"max_steps": 3, "checkpoint.every": 2, "prompts_per_step": 4})
    whole = tuner.train(config, runs=tmp_path / "whole")
    train_and_be_killed(config, tmp_path / "killed", Algorithm, "_learn_values", 2)
    assert_same(whole, tuner.train(config, runs=tmp_path / "killed"))


@pytest.mark.parametrize("which", ["policy", "reward"])
def test_a_start_that_was_replaced_is_refused(ppo, tmp_path, which):
    """The reference, or the reward, of the rest of the run would be another than of its beginning."""
    config = ppo({"checkpoint.every": 1, "max_steps": 3, "prompts_per_step": 4})
    copy = tmp_path / which
    shutil.copytree(getattr(config, which).path, copy)
    config = ppo({"checkpoint.every": 1, "max_steps": 3, "prompts_per_step": 4, f"{which}.path": str(copy)})
    train_and_be_killed(config, tmp_path, Algorithm, "_learn_values", 2)
    file = copy / "model" / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match=f"the {which}.* changed since this run began"):
        tuner.train(config, runs=tmp_path)


def test_a_reward_model_of_another_base_is_refused(ppo, tmp_path, start):
    changes = {"checkpoint.every": 1, "max_steps": 3, "prompts_per_step": 4, "critic_from": "policy"}
    copy = tmp_path / "reward"
    shutil.copytree(start("reward", FULL).folder, copy)
    config = ppo(changes | {"reward.path": str(copy)})
    train_and_be_killed(config, tmp_path, Algorithm, "_learn_values", 2)
    (file,) = copy.glob("model/*.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match="the reward changed since this run began"):
        tuner.train(config, runs=tmp_path)


# Split and shared out


def test_twice_is_the_same_and_another_seed_another(ppo, tmp_path):
    one, two = (tuner.train(ppo({"max_steps": 2}), runs=tmp_path / place) for place in ("one", "two"))
    assert_same(one, two)
    other = tuner.train(ppo({"max_steps": 2, "seed": 1}), runs=tmp_path / "seed")
    assert records(other) != records(one)


SPLITS = {
    "passes": {"tokens_per_pass": 64},
    "cache": {"sampling.cache_gib": 1e-5},
    "checkpointing": {"gradient_checkpointing": True},
    "selective checkpointing": {"gradient_checkpointing": "selective"},
    "checkpointing, offloaded": {"gradient_checkpointing": "offload"},
}


@pytest.mark.parametrize("kind", ["lora", "all-weights"])
def test_splits_change_nothing_but_rounding(ppo, tmp_path, watched, kind):
    """How much a pass holds, how much the cache, and what is computed again."""
    shape = {"max_steps": 3, "tokens_per_pass": 1024, "mini_batches": 2}

    def config(changes):
        return ppo(shape | changes) if kind == "lora" else of_kind(ppo, kind, shape | changes)

    whole = tuner.train(config({}), runs=tmp_path / "whole")
    answers = watched.answers
    assert {len(seen) for seen in watched.seen.values()} == {2}  # a pass for each mini-batch
    for name, changes in SPLITS.items():
        watched.clear()
        split = tuner.train(config(changes), runs=tmp_path / name)
        assert watched.answers == answers, name
        assert_close(whole, split)
        if name == "passes":
            assert min(len(seen) for seen in watched.seen.values()) >= 5
        if "checkpointing" in name:
            assert records(split) == records(whole)


WATCHED = """
import json, os, signal, sys, tuner
from importlib import import_module
from pathlib import Path
from tuner.config import from_json
from tuner.training.stop_signals import Interrupted
stage = import_module("tuner.stages.rl.loop")
answer = stage.answer_prompts
def answering(*args, step, **settings):
    rollout = answer(*args, step=step, **settings)
    if name == "stopped" and step == 1 and step not in found and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    found[step] = [answer.tokens.tolist() for answer in rollout.answers]
    return rollout
stage.answer_prompts = answering
for name in sys.argv[2:]:
    found = {}
    config = from_json(Path(sys.argv[1], f"{name}.json").read_text())
    runs = Path(sys.argv[1], "two", name)
    if name == "stopped":
        try:
            tuner.train(config, runs=runs)
        except Interrupted as stop:
            assert str(stop) == "stopped by SIGTERM after step 1, saved"
    run = tuner.train(config, runs=runs)
    Path(sys.argv[1], f"{name}-{os.environ['RANK']}.answers").write_text(json.dumps(found))
"""
"""What each of two processes does: the same, and write its answers down. One of them is asked to stop `stopped` between
two parts of a step; both do, and go on with it."""


def test_two_processes_equal_one(ppo, tmp_path, watched):
    """In one launch: stopped; with everything that has a total; with a rank that has no row, and no prompt."""
    tested = {"prompts.test_files": [TEN], "evaluation.rows": 3, "evaluation.every": 2}
    tested |= {"evaluation.rule": f"{__file__}:gold", "max_steps": 3}
    several = {"mini_batches": 2, "update_epochs": 2, "whiten_advantages": True, "tokens_per_pass": 64}
    followed = {"kl": {"target": 1e-3, "horizon": 8}, "entropy_bonus": 0.01, "critic_updates": 2}
    cases = {
        "stopped": ppo({"max_steps": 2}),
        "rich": ppo(RICH | several | {"evaluation.rule": f"{__file__}:lengthy"}),
        "one-row": ppo({"tokens_per_pass": 2048, "max_steps": 3, **several, "mini_batches": 1, **followed}),
        "one-prompt": ppo({"prompts_per_step": 1, "critic_warmup": 0, **tested, "evaluation.rows": 1}),
        "all-weights": of_kind(ppo, "all-weights", {"max_steps": 3}),
    }
    in_two_processes(tmp_path, cases, WATCHED, {"TUNER_CACHE": str(tmp_path / "cache")})
    for name, config in cases.items():
        watched.clear()
        one, two = tuner.train(config, runs=tmp_path / "one" / name), Run(tmp_path / "two" / name / "ppo")
        assert two.read_json("versions")["processes"] == 2
        for rank in range(2):
            answers = json.loads((tmp_path / f"{name}-{rank}.answers").read_text())
            assert {int(step): tokens for step, tokens in answers.items()} == watched.answers, name
        assert_close(one, two)
        kept = [state(run, len(one.metrics))[0]["counters"]["state"] for run in (one, two)]
        assert kept[0]["replay"] == kept[1]["replay"]
        assert kept[0]["scores"] == pytest.approx(kept[1]["scores"], rel=1e-4)


# How a run begins


def assert_nothing_moved(record: dict[str, Any], gap: float) -> None:
    assert record["ratio"] == 1.0
    assert record["clipped"] == 0.0
    assert record["kl"] == 0.0
    assert record["kl_k3"] == 0.0
    assert record["value"] == 0.0 or record["step"] > 1
    assert record["generator_gap"] < gap
    assert record["grad_norm_policy"] > 0


@pytest.mark.parametrize(
    ("kind", "changes", "gap"),
    [
        (None, {}, 1e-5),
        (None, {"sampling.temperature": 0.7, "gradient_checkpointing": True}, 1e-5),
        ("nf4-8bit-paged", {}, 0.03),
        ("nf4-8bit-paged", {"gradient_checkpointing": True}, 0.03),
        ("two-bases", {}, 0.03),
        ("separate", {}, 1e-5),
        ("all-weights", {}, 1e-5),
        ("fresh-adapter", {}, 1e-5),
        ("critic-from-policy", {}, 1e-5),
    ],
)
@pytest.mark.parametrize("warmup", [0, 2])
def test_the_first_step_of_the_policy(ppo, tmp_path, watched, kind, changes, gap, warmup):
    """The ratio is 1 and the divergence 0, to the last bit; the generator's numbers differ by rounding."""
    changes = {"critic_warmup": warmup, "max_steps": warmup + 1, "prompts_per_step": 4, **changes}
    changes |= {"tokens_per_pass": 1024}  # one row, so that the mean ratio is no sum of parts
    config = ppo(changes) if kind is None else of_kind(ppo, kind, changes)
    run = tuner.train(config, runs=tmp_path)
    assert_nothing_moved(run.metrics[warmup], gap)
    for record in run.metrics[:warmup]:
        assert record["kl"] == record["kl_k3"] == 0.0
        assert "policy_loss" not in record
    for _, logprobs_N, old_N, *_ in watched.policy:
        assert torch.equal(logprobs_N, old_N)
    assert watched.policy
    for one in (one for seen in watched.seen.values() for one in seen):
        assert torch.equal(one.old_N, one.reference_N)
    assert not any(one.values_N.any() for one in watched.seen[0])


def test_the_first_step_of_all_weights_in_bf16(ppo, tmp_path):
    changes = {"critic_warmup": 0, "max_steps": 1, "prompts_per_step": 4, "precision": "bf16"}
    run = tuner.train(of_kind(ppo, "all-weights", changes), runs=tmp_path)
    assert_nothing_moved(run.metrics[0], 0.03)


def test_separate_begins_as_shared_does(ppo, tmp_path, watched):
    changes = {"critic_warmup": 0, "max_steps": 2}
    shared = tuner.train(ppo(changes), runs=tmp_path / "shared")
    answers = watched.answers
    watched.clear()
    separate = tuner.train(ppo(changes | {"roles": "separate"}), runs=tmp_path / "separate")
    assert watched.answers == answers
    assert_nothing_moved(separate.metrics[0], 1e-5)
    for own, their in zip(shared.metrics, separate.metrics, strict=True):
        rel = 1e-4 if own["step"] == 1 else 1e-2
        for name in CLOSE:
            if name in own:
                here, there = (math.nan if one[name] is None else one[name] for one in (own, their))
                assert here == pytest.approx(there, rel=rel, abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_reward_and_reference_stay_policy_and_critic_move(ppo, tmp_path, watched, kind):
    """After training, the first rollout's answers have the scores they had, to the last bit: the scorer's own."""
    changes = {"prompts_per_step": 4, "checkpoint.every": 1, "checkpoint.keep": 9, "max_steps": 3}
    config = ppo(changes) if kind is None else of_kind(ppo, kind, changes)
    run = tuner.train(config, runs=tmp_path)
    made, first = watched.made, watched.rollouts[0]
    again = made.reward.score(first.prompts, first.texts)
    assert np.array_equal(again, watched.scores[0])
    assert np.ptp(again) > 0
    rollout = watched.rollouts[0]
    asked = [
        ScoreRequest(prompt.with_answer(text), prompt.condition, prompt.turns)
        for prompt, text in zip(rollout.prompts, rollout.texts, strict=True)
    ]
    expected = open_scorer(config.reward.path, precision=config.precision).score_requests(asked)
    tolerance = 1e-5 if config.precision == "fp32" else 0.02
    assert again.tolist() == pytest.approx(expected.tolist(), rel=tolerance, abs=tolerance)
    rows = [one.row for one in watched.seen[0]]
    for one, new in zip(watched.seen[0], made.algorithm.observe(made.roles, rows), strict=True):
        assert torch.equal(new.reference_N, one.reference_N)
        assert not torch.equal(new.old_N, one.old_N)
        assert not torch.equal(new.values_N, one.values_N)
    assert run.metrics[-1]["kl_k3"] > 0


# The critic's warm-up


def test_in_the_warm_up_the_critic_alone_moves(ppo, tmp_path):
    changes = {"critic_warmup": 2, "max_steps": 4, "checkpoint.every": 1, "checkpoint.keep": 9}
    changes |= {"schedule": {"kind": "cosine", "warmup": 0, "final": 0.5}, "mini_batches": 2}
    run = tuner.train(ppo(changes), runs=tmp_path)
    states = [state(run, step) for step in (1, 2, 3, 4)]
    trained = [tensors for _, tensors, _ in states]
    policy = [name for name in trained[0] if name.startswith("policy.")]
    critic = [name for name in trained[0] if name.startswith("critic.")]
    assert policy
    assert len(policy) + len(critic) == len(trained[0])
    begin = load_file(Path(run.config.policy.path, "model", "adapter_model.safetensors"))
    for name in policy:
        own = begin[name.removeprefix("policy.").replace(".default.", ".")]
        assert torch.equal(trained[0][name], own)  # bit for bit where it came from
        assert torch.equal(trained[0][name], trained[1][name])
    assert any(not torch.equal(trained[1][name], trained[2][name]) for name in policy)
    head = next(name for name in critic if "score" in name)
    assert trained[0][head].any()  # from zeros, after the first step
    for one, two in itertools.pairwise(trained):
        assert any(not torch.equal(one[name], two[name]) for name in critic)
    assert "replay" not in states[1][0]["counters"]["state"]
    assert states[2][0]["counters"]["state"]["replay"]["drawn"] > 0
    for record in run.metrics[:2]:
        assert record["lr_policy"] == 0.0
        assert record["loss"] == record["value_loss"]
        assert not {"policy_loss", "replay_loss", "ratio", "grad_norm_policy"} & record.keys()
    config = run.config
    assert run.metrics[2]["lr_policy"] == config.optimizer.lr  # where its schedule begins
    assert run.metrics[0]["lr_critic"] == config.critic_lr > run.metrics[1]["lr_critic"]


def test_what_is_replayed_says_nothing_of_a_warm_up(ppo, tmp_path, watched):
    """With or without replay, until the policy learns a run is the same."""
    changes = {"critic_warmup": 2, "max_steps": 3}
    one = tuner.train(ppo(changes), runs=tmp_path / "one")
    answers = watched.answers
    watched.clear()
    two = tuner.train(ppo(changes | {"replay": None}), runs=tmp_path / "two")
    assert watched.answers == answers
    assert records(one)[:2] == records(two)[:2]
    assert one.metrics[2]["policy_loss"] == two.metrics[2]["policy_loss"]


# Replay


def test_replay_keeps_to_its_ratio_over_the_run(ppo, tmp_path):
    changes = {"checkpoint.every": 1, "checkpoint.keep": 9, "replay.ratio": 0.7, "mini_batches": 3}
    run = tuner.train(ppo(changes), runs=tmp_path)
    lengths = replay_rows(run).lengths
    order = np.concatenate(
        [np.random.default_rng((0, epoch)).permutation(len(lengths)) for epoch in range(9)]
    )
    tokens = np.diff([0, *(record["tokens"] for record in run.metrics)])
    for step in range(2, 5):
        kept = state(run, step)[0]["counters"]["state"]["replay"]
        taken = lengths[order[: kept["drawn"]]].sum()
        due = 0.7 * tokens[1:step].sum()  # the first step is the critic's
        assert kept["owed"] == pytest.approx(due - taken, abs=1e-6)
        assert 0 <= kept["owed"] < lengths[order[kept["drawn"]]]


def test_replayed_tokens_are_logged(ppo, tmp_path):
    run = tuner.train(ppo({"max_steps": 2}), runs=tmp_path)
    assert run.metrics[1]["replay_tokens"] > 0


def replay_rows(run: Run) -> Any:
    return load_examples(run.config.replay.data, read_tokenizer(run.model_folder)).train


def test_replay_enters_the_gradient_with_its_coefficient(ppo, tmp_path, watched, monkeypatch):
    """The gradient of a step with replay less that of one without is the coefficient's share of the rows' mean loss."""
    found: dict[str, torch.Tensor] = {}
    update = Step.update

    def noting(step: Step, *only: str) -> None:
        if "policy" in only:
            found.update(
                {name: weight.grad.clone() for name, weight in watched.made.roles.trained("policy").items()}
            )
        update(step, *only)

    monkeypatch.setattr(Step, "update", noting)
    changes = {"max_steps": 2, "checkpoint.every": 1, "checkpoint.keep": 9}
    tuner.train(ppo(changes | {"replay": None}), runs=tmp_path / "without")
    without = dict(found)
    run = tuner.train(ppo(changes | {"replay.coefficient": 2.0}), runs=tmp_path / "with")
    drawn = state(run, 2)[0]["counters"]["state"]["replay"]["drawn"]
    rows = replay_rows(run)
    order = np.random.default_rng((0, 0)).permutation(len(rows))
    model = plain_policy(run.config.policy.path, trainable=True)
    loss, weight = plain_loss(model, [rows.example(int(row)) for row in order[:drawn]])
    assert run.metrics[1]["replay_loss"] == pytest.approx(loss.item() / weight, rel=1e-5)
    (2.0 * loss / weight).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name] - without[name], gradient, rtol=1e-3, atol=1e-5), name


def plain_loss(model: Any, samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, float]:
    """Summed weighted cross entropy of rows one by one, and the weight."""
    losses, total = [], 0.0
    for tokens, weights_T in samples:
        logits = model(input_ids=torch.tensor(tokens)[None].long(), use_cache=False).logits[0, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:]).long()[:, None])[:, 0]
        losses.append(-(logprobs * torch.tensor(weights_T[1:])).sum())
        total += float(weights_T[1:].sum())
    return torch.stack(losses).sum(), total


# The record


def plain_policy(path: str | Path, trainable: bool = False) -> Any:
    """The language model of a run by transformers and peft alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import tuner.models  # noqa: F401 (registers InternLM2)

    base = AutoModelForCausalLM.from_pretrained(SHALLOW, dtype=torch.float32, attn_implementation="sdpa")
    return PeftModel.from_pretrained(base, str(Path(path, "model")), is_trainable=trainable)


def plain_critic(path: str) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    import tuner.models  # noqa: F401

    base = AutoModelForSequenceClassification.from_pretrained(
        SHALLOW, dtype=torch.float32, num_labels=1, attn_implementation="sdpa"
    )
    return PeftModel.from_pretrained(base, str(Path(path, "model")))


def put(model: Any, saved: dict[str, torch.Tensor], role: str) -> None:
    """The weights of a checkpoint into a plain model; every trained one must find its place."""
    state = dict(model.named_parameters())
    own = {
        name.removeprefix(f"{role}."): tensor for name, tensor in saved.items() if name.startswith(f"{role}.")
    }
    with torch.no_grad():
        for name, tensor in own.items():
            if name == "score.weight":
                place = "base_model.model.score.modules_to_save.default.weight"
            else:
                place = name.replace(f".{role}.", ".default.")
            state[place].copy_(tensor)


OPTIONS: dict[str, dict[str, Any]] = {
    "as-it-is": {},
    "cool": {"sampling.temperature": 0.7, "sampling.top_p": 1.0},
    "k2-clipped-penalised": {
        "kl_estimator": "k2",
        "kl": 1.0,
        "missing_end_penalty": 0.5,
        "reward_clip": 0.1,
        "sampling.max_new_tokens": 9,
    },
    "k3-raw-whitened": {
        "kl_estimator": "k3",
        "kl": 1.0,
        "normalize_rewards": False,
        "whiten_advantages": True,
        "gamma": 0.9,
        "gae_lambda": 0.8,
    },
    "one-token": {"sampling.max_new_tokens": 1, "missing_end_penalty": 0.5},
    "two-tokens": {"sampling.max_new_tokens": 2, "missing_end_penalty": 0.5},
}
ESTIMATES = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) - 1 + d}


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_the_record_by_another_route(ppo, tmp_path, watched, option):
    """All of a step's figures from its prompts and answers, and the weights it began with."""
    changes = {"max_steps": 3, "checkpoint.every": 1, "checkpoint.keep": 9, **OPTIONS[option]}
    config = ppo(changes)
    with torch.enable_grad():
        run = tuner.train(config, runs=tmp_path)
    saved = state(run, 2)[1]
    policy, reference = plain_policy(config.policy.path), plain_policy(config.policy.path)
    critic = plain_critic(config.reward.path)
    put(policy, saved, "policy")
    put(critic, saved, "critic")
    head = saved["critic.score.weight"]
    rollout, temperature = watched.rollouts[2], config.sampling.temperature
    scores = {step: plain_scores(config, watched.rollouts[step]) for step in range(3)}
    learned = {step: scores[step].copy() for step in range(3)}
    for step in range(3):
        assert watched.scores[step].tolist() == pytest.approx(scores[step].tolist(), rel=1e-4, abs=1e-6)
        learned[step] -= config.missing_end_penalty * ~watched.rollouts[step].ended
        learned[step] = learned[step].clip(-config.reward_clip, config.reward_clip)
    everything = np.concatenate(list(learned.values()))
    final = learned[2]
    if config.normalize_rewards:
        final = (final - everything.mean()) / (everything.std() + 1e-8)

    found: dict[str, list[np.ndarray]] = {
        name: [] for name in ("d", "entropy", "values", "returns", "advantages", "rewards")
    }
    for place, answer in enumerate(rollout.answers):
        tokens = torch.tensor(np.concatenate([rollout.tokens[place], answer.tokens])).long()
        first = len(rollout.tokens[place])
        own, theirs = (
            (model(input_ids=tokens[None]).logits[0, first - 1 : -1] / temperature).double().log_softmax(-1)
            for model in (policy, reference)
        )
        chosen = tokens[first:, None]
        d = (own.gather(-1, chosen) - theirs.gather(-1, chosen))[:, 0].numpy()
        hidden = critic.get_base_model().model(input_ids=tokens[None]).last_hidden_state[0, first - 1 : -1]
        values = (hidden @ head[0]).double().numpy()
        rewards = -config.kl * ESTIMATES[config.kl_estimator](d)
        rewards[-1] += final[place]
        advantages, later = np.zeros(len(d)), 0.0
        for t in reversed(range(len(d))):
            after = values[t + 1] if t + 1 < len(d) else 0.0
            later = rewards[t] + config.gamma * after - values[t] + config.gamma * config.gae_lambda * later
            advantages[t] = later
        for name, value in {
            "d": d, "entropy": -(own.exp() * own).sum(-1).numpy(), "values": values,
            "returns": advantages + values, "advantages": advantages, "rewards": rewards,
        }.items():  # fmt: skip
            found[name].append(value)
    d, entropy, values, returns, advantages = (
        np.concatenate(found[name]) for name in ("d", "entropy", "values", "returns", "advantages")
    )
    if config.whiten_advantages:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    rows = replay_rows(run)
    order = np.random.default_rng((0, 0)).permutation(len(rows))
    drawn = [state(run, step)[0]["counters"]["state"]["replay"]["drawn"] for step in (2, 3)]
    replay, weight = plain_loss(policy, [rows.example(int(row)) for row in order[drawn[0] : drawn[1]]])
    rewards = np.array([one.sum() for one in found["rewards"]])
    brief = np.array([prompt.condition == "brief" for prompt in rollout.prompts])
    assert 0 < brief.sum() < len(brief)
    expected = {
        "score": scores[2].mean(),
        "score/brief": scores[2][brief].mean(),
        "reward": rewards.mean(),
        "reward/brief": rewards[brief].mean(),
        "kl": d.mean(),
        "kl_k3": (np.exp(-d) - 1 + d).mean(),
        "entropy": entropy.mean(),
        "value": values.mean(),
        "explained_variance": 1 - (returns - values).var() / returns.var(),
        "length": np.mean([len(answer.tokens) for answer in rollout.answers]),
        "ended": np.mean(
            [answer.tokens[-1] in watched.made.engine.end_ids for answer in rollout.answers]
        ),
        "policy_loss": -advantages.mean(),
        "value_loss": ((values - returns) ** 2 / 2).mean(),
        "ratio": 1.0,
        "clipped": 0.0,
        "replay_loss": replay.item() / weight,
        "prompts": 8,
    }  # fmt: skip
    expected["loss"] = expected["policy_loss"] + expected["value_loss"] + 0.5 * expected["replay_loss"]
    record = run.metrics[2]
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=1e-3, abs=3e-5), name
    assert record["generator_gap"] < 1e-5
    assert abs(record["kl"]) + record["kl_k3"] > 1e-7  # else there was nothing to tell
    lengths = [
        len(tokens) + len(answer.tokens)
        for tokens, answer in zip(rollout.tokens, rollout.answers, strict=True)
    ]
    assert record["tokens"] - run.metrics[1]["tokens"] == sum(lengths)
    for answer in rollout.answers:  # nothing stands behind an end, and what has none was cut off
        ends = [token in watched.made.engine.end_ids for token in answer.tokens.tolist()]
        assert not any(ends[:-1])
        assert ends[-1] or len(answer.tokens) == config.sampling.max_new_tokens
        assert ends[-1] == answer.ended


def plain_scores(config: PPO, rollout: Any) -> np.ndarray:
    """What `tuner score` says of the answers, as rows of messages."""
    scorer = open_scorer(config.reward.path)
    rows = []
    for prompt, answer in zip(rollout.prompts, rollout.answers, strict=True):
        tokens = answer.tokens[:-1] if answer.ended else answer.tokens
        text = scorer.loaded.tokenizer.decode(tokens.tolist())
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
        rows.append(ScoreRequest(prompt.with_answer(text), prompt.condition, prompt.turns))
        if text:
            messages = [*turns, {"role": "assistant", "content": text}]
            row = {"messages": messages, "condition": prompt.condition}
            one, other = scorer.score([row])[0], scorer.score_requests(rows[-1:])[0]
            assert one == pytest.approx(other, rel=1e-5)
    return np.array([scorer.score_requests([row])[0] for row in rows])


SIX = ("generate", "logprobs", "scores", "rewards", "advantages", "updates")


def test_every_part_of_a_step_has_its_time(whole):
    for record in whole[0].metrics:
        times = {name: value for name, value in record.items() if name.startswith("seconds/")}
        assert times.keys() == {f"seconds/{name}" for name in SIX}
        assert min(times.values()) > 0
        assert sum(times.values()) <= record["seconds"]


def test_the_first_answers_of_every_step_are_in_a_file(whole):
    run, answers = whole
    read = read_tokenizer(run.model_folder).decode
    found = shown(run)
    steps, samples = RICH["max_steps"], RICH["evaluation.recorded_answers"]
    assert [row["step"] for row in found] == [step for step in range(1, steps + 1) for _ in range(samples)]
    asked = asked_in_training()
    for place, row in enumerate(found):
        assert list(row) == [
            *(
                "step",
                "prompt",
                "answer",
                "condition",
                "reference",
                "score",
                "ended",
                "prompt_number",
                "origin",
            ),
            "gold",
        ]
        ((turn,), number) = row["prompt"], row["prompt_number"]
        assert turn["role"] == "user"
        assert (turn["content"], row["reference"], row["condition"]) == asked[number]
        file, _, line = row["origin"].rpartition(":")
        assert Path(file).name == ("train.jsonl" if number < 30 else "test.jsonl")
        assert int(line) == 1 + number % 30
        assert row["gold"] == gold(row["answer"], {"messages": [{"content": row["reference"]}]})
        tokens = answers[row["step"] - 1][place % samples]
        assert row["answer"] == read(tokens[:-1] if row["ended"] else tokens)
        assert math.isfinite(row["score"])
    assert {row["condition"] for row in found} == {"brief", None}
    assert {row["ended"] for row in found} == {True, False}


def asked_in_training() -> list[tuple[str, str, str | None]]:
    """What the small config's prompts ask, with their reference and condition."""
    return [
        (*(turn["content"] for turn in json.loads(line)["messages"]), condition)
        for name, condition, limit in (("train", "brief", 30), ("test", None, 10))
        for line in Path(locate(f"tuner:sums/{name}.jsonl")).read_text().splitlines()[:limit]
    ]


def test_the_record_is_that_of_the_answers_in_the_file(ppo, tmp_path):
    """Score and share of ended answers, in all and by condition, from the run's own files alone. The reward model gives
    them the same scores again: a system prompt of the policy's own is written apart, and not read."""
    changes = {"prompts_per_step": 6, "evaluation.recorded_answers": None, "critic_warmup": 0, "max_steps": 3}
    changes |= {
        "prompts.system": "Add.",
        "prompts.test_files": [TEN],
        "evaluation.rule": f"{__file__}:lengthy",
    }
    config = ppo(changes)
    run = tuner.train(config, runs=tmp_path)
    found = shown(run)
    assert len(found) == 3 * 6  # all there are
    for record in run.metrics:
        rows = [row for row in found if row["step"] == record["step"]]
        assert record["prompts"] == len(rows)
        assert record["ended"] == pytest.approx(np.mean([row["ended"] for row in rows]))
        assert record["score"] == pytest.approx(np.mean([row["score"] for row in rows]), rel=1e-5)
        rows.sort(key=lambda row: row["score"])
        assert record["gold"] == pytest.approx(np.mean([row["gold"] for row in rows]))
        assert record["gold_top_tenth"] == rows[-1]["gold"]
        brief = [row["score"] for row in rows if row["condition"] == "brief"]
        assert record.get("score/brief") == (pytest.approx(np.mean(brief), rel=1e-5) if brief else None)
        assert np.ptp([row["score"] for row in rows]) > 1e-3  # else a mean says nothing
    assert 0 < np.mean([row["ended"] for row in found]) < 1
    assert {row["policy_system"] for row in found} == {"Add."}
    scored = io.StringIO()
    assert score_file(config.reward.path, str(run.folder / "rollouts.jsonl"), scored) == len(found)
    for row, again in zip(found, map(json.loads, scored.getvalue().splitlines()), strict=True):
        assert again.pop("score") == pytest.approx(row.pop("score"), rel=1e-4, abs=1e-5)
        assert again == row


@torch.no_grad()
def test_how_far_the_updates_went_by_another_route(ppo, tmp_path, watched):
    """The second of two updates begins with the weights that a run of one update leaves behind."""
    changes = {"critic_warmup": 0, "max_steps": 1, "replay": None, "tokens_per_pass": 1024}
    changes["optimizer.lr"] = 2e-3
    with torch.enable_grad():
        one = tuner.train(ppo(changes), runs=tmp_path / "one")
        two = tuner.train(ppo(changes | {"update_epochs": 2}), runs=tmp_path / "two")
    assert one.metrics[0]["update_kl"] == pytest.approx(0.0, abs=1e-9)
    policies, leads = (plain_policy(one.config.policy.path), plain_policy(one.folder)), []
    rollout = watched.rollouts[0]
    for prompt, answer in zip(rollout.tokens, rollout.answers, strict=True):
        tokens = torch.tensor(np.concatenate([prompt, answer.tokens])).long()
        old, new = (
            model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for model in policies
        )
        leads.append((new - old).gather(-1, tokens[len(prompt) :, None])[:, 0].numpy())
    lead = np.concatenate(leads)
    ratio = np.exp(lead)
    record = two.metrics[0]
    assert record["update_kl"] == pytest.approx((ratio - 1 - lead).mean() / 2, rel=1e-4)
    assert record["ratio"] == pytest.approx((1 + ratio.mean()) / 2, rel=1e-4)
    assert record["update_kl"] > 0.01  # far enough that every other estimate is another number


@pytest.mark.parametrize("clip", [None, 0.01])
def test_later_epochs_learn_from_what_was_seen_before(ppo, tmp_path, watched, clip):
    """Old log-probabilities and values stay those of before the step's first update; losses by the formulas."""
    changes = {"critic_warmup": 0, "max_steps": 1, "update_epochs": 3, "mini_batches": 2, "value_clip": clip}
    run = tuner.train(
        ppo(changes | {"clip": 0.05, "optimizer.lr": 0.02, "tokens_per_pass": 1024}), runs=tmp_path
    )
    seen = watched.seen[0]
    assert len(watched.policy) == len(watched.values) == 6
    policy_losses, value_losses, ratios, clipped, moved, sizes = [], [], [], [], [], []
    for number, (policy, value) in enumerate(zip(watched.policy, watched.values, strict=True)):
        one = seen[number % 2]
        _, logprobs_N, old_N, advantages_N, bound = policy
        assert torch.equal(old_N, one.old_N)
        assert torch.equal(advantages_N, one.advantages_N)
        ratio, a = np.exp((logprobs_N.detach() - old_N).double().numpy()), advantages_N.double().numpy()
        plain, held = ratio * a, ratio.clip(1 - bound, 1 + bound) * a
        policy_losses.append(-np.minimum(plain, held).mean())
        ratios.append(ratio.mean())
        clipped.append((held < plain).mean())
        moved.append((ratio - 1 - np.log(ratio)).mean())
        sizes.append(len(ratio))
        _, values_N, returns_N, before_N, value_bound = value
        assert value_bound == clip
        assert torch.equal(before_N, one.values_N)
        assert torch.equal(returns_N, one.returns_N)
        v, r, b = (part.detach().double().numpy() for part in (values_N, returns_N, before_N))
        squares = (v - r) ** 2
        if clip is not None:
            squares = np.maximum(squares, (b + (v - b).clip(-clip, clip) - r) ** 2)
        value_losses.append((squares / 2).mean())
        assert (number < 1) == torch.equal(
            logprobs_N, old_N
        )  # the first update alone begins where answers were drawn
    record = run.metrics[0]
    for name, values in (
        ("policy_loss", policy_losses),
        ("value_loss", value_losses),
        ("ratio", ratios),
        ("clipped", clipped),
        ("update_kl", moved),
    ):
        assert record[name] == pytest.approx(np.average(values, weights=sizes), rel=1e-4)
    assert record["clipped"] > 0
    assert record["ratio"] != 1


def test_a_value_clip_changes_the_critic_alone_and_only_later_epochs(ppo, tmp_path):
    changes = {"critic_warmup": 1, "max_steps": 1, "checkpoint.every": 1}
    runs = {
        (clip, epochs): tuner.train(
            ppo(changes | {"value_clip": clip, "update_epochs": epochs}), runs=tmp_path / f"{clip}-{epochs}"
        )
        for clip in (None, 1e-3)
        for epochs in (1, 3)
    }
    assert records(runs[None, 1]) == records(runs[1e-3, 1])
    assert records(runs[None, 3]) != records(runs[1e-3, 3])


# Answers at the limits


@pytest.mark.parametrize("ends", ["all", "half"])
def test_answers_that_are_only_their_end(ppo, tmp_path, watched, monkeypatch, ends):
    """Without a word to score, they have a score: that of a turn without text."""
    every = frozenset(range(0, 100_000, 1 if ends == "all" else 2))
    monkeypatch.setattr(preparing, "end_ids", lambda *args: every)
    changes = {"max_steps": 3, "missing_end_penalty": 0.5, "sampling.max_new_tokens": 3}
    config = ppo(changes)
    run = tuner.train(config, runs=tmp_path)
    for step, rollout in watched.rollouts.items():
        assert [text == "" for text in rollout.texts] == [
            len(answer.tokens) == 1 and answer.ended for answer in rollout.answers
        ]
        assert watched.scores[step].tolist() == pytest.approx(
            plain_scores(config, rollout).tolist(), rel=1e-4, abs=1e-6
        )
    if ends == "all":
        assert {record["length"] for record in run.metrics} == {1.0}
        assert {record["ended"] for record in run.metrics} == {1.0}
    assert run.metrics[-1]["bad_steps"] == 0
    assert all(math.isfinite(record["loss"]) for record in run.metrics)
    assert run.metrics[-1]["kl_k3"] > 0


def test_a_score_of_zero_is_a_score(ppo, tmp_path, watched, monkeypatch):
    """All answers equal: nothing is learned of them, and the divergence still costs."""
    monkeypatch.setattr(ModelReward, "score", lambda source, prompts, answers: np.zeros(len(answers)))
    run = tuner.train(ppo({"max_steps": 3, "kl": 0.5}), runs=tmp_path)
    for record in run.metrics:
        assert record["score"] == 0.0
        assert record["bad_steps"] == 0
        lengths = watched.rollouts[record["step"] - 1].answer_lengths
        expected = -0.5 * record["kl"] * lengths.mean()
        assert record["reward"] == pytest.approx(expected, abs=1e-6)
    assert run.metrics[1]["policy_loss"] == pytest.approx(0.0, abs=1e-6)


def test_one_score_that_is_no_number_spoils_one_step(ppo, tmp_path, watched, monkeypatch):
    score = ModelReward.score

    def broken(*args):
        found = score(*args)
        return found * np.where(np.arange(len(found)) == 3, np.nan, 1) if watched.step == 1 else found

    monkeypatch.setattr(ModelReward, "score", broken)
    run = tuner.train(ppo({"max_steps": 4}), runs=tmp_path)
    assert [record["bad_steps"] for record in run.metrics] == [0, 1, 1, 1]
    assert run.metrics[3]["loss"] is not None


# What is left behind


def test_the_run_folder(ppo, tmp_path, watched):
    """Its model is an adapter for plain peft; it can be talked to; its results are what was measured."""
    from tuner.data.conversation import Turn
    from tuner.models.chat import open_chat

    run = tuner.train(ppo(RICH | {"max_steps": 4}), runs=tmp_path)
    assert not [
        path for path in run.model_folder.iterdir() if path.is_dir()
    ]  # no role's adapter but the policy's
    settings = json.loads((run.model_folder / "adapter_config.json").read_text())
    assert settings["r"] == 8
    plain = plain_policy(run.folder)
    made, rollout = watched.made, watched.rollouts[3]
    rows = rollout.rows(1, 1024, made.context.devices)
    with made.roles.role("policy") as model:
        own = [token_logprobs(model, row.batch)[0] for row in rows]
    for row, logprobs_N in zip(rows, own, strict=True):
        for place, index in enumerate(row.answers.tolist()):
            tokens = torch.tensor(
                np.concatenate([rollout.tokens[index], rollout.answers[index].tokens])
            ).long()
            first = len(rollout.tokens[index])
            with torch.no_grad():
                logits = plain(input_ids=tokens[None]).logits[0, first - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, tokens[first:, None])[:, 0]
            part = logprobs_N[row.borders[place] : row.borders[place + 1]]
            assert torch.allclose(part, expected, atol=1e-4)
    results = run.results
    for name in ("gold", "score", "replay"):
        assert results[name].keys() == {"before", "after"}
        last = run.metrics[-1]["eval_replay_loss" if name == "replay" else f"eval_{name}"]
        assert results[name]["after"] == pytest.approx(last)
    assert results["score"]["before"] != results["score"]["after"]
    assert results["kl"] == run.metrics[-1]["kl"]
    assert results["conditions"] == {"polite": {name: results[name] for name in ("gold", "score")}}
    assert [(one["from"], one["to"]) for one in results["positions"]] == [(0, 256)]
    assert results["positions"][0]["after"] == pytest.approx(results["replay"]["after"])
    chat = open_chat(str(run.folder))
    sample = run.samples[-1]
    question = run_prompts(run)[0]
    assert "".join(chat.answer((Turn("user", question),), max_new_tokens=11)) == run.samples[-2]["answer"]
    assert question in run.samples[-2]["prompt"]
    assert sample["condition"] == "polite"


def run_prompts(run: Run) -> list[str]:
    """What the held-out prompts ask."""
    lines = Path(locate("tuner:sums/test.jsonl")).read_text().splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines[: len(run.samples)]]


def test_a_run_goes_on_from_a_run(ppo, tmp_path):
    """The reference of a second run is the policy that the first has left."""
    one = tuner.train(ppo({"max_steps": 3}), runs=tmp_path / "one")
    two = tuner.train(
        ppo({"max_steps": 1, "critic_warmup": 0, "policy.path": str(one.folder)}), runs=tmp_path / "two"
    )
    assert two.metrics[0]["kl"] == 0.0
    assert two.metrics[0]["ratio"] == pytest.approx(1.0, abs=1e-6)


def test_a_saved_dropout_is_off(ppo, tmp_path, watched):
    """The SFT run was trained with dropout; a ratio of two passes must be that of the weights alone."""
    run = tuner.train(
        ppo(
            {"max_steps": 1, "critic_warmup": 0},
            sft={"adapter.dropout": 0.5},
            reward={"adapter.dropout": 0.5},
        ),
        runs=tmp_path,
    )
    assert run.metrics[0]["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert all(torch.equal(logprobs_N, old_N) for _, logprobs_N, old_N, *_ in watched.policy)
