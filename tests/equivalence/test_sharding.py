"""Frozen weights in shards: several processes hold them together, and train what one process would.

Replicated and sharded, the same processes add the same numbers in the same order: they are compared bit for bit. One
process adds them in another order. Adam divides by the square root of small squares, so that a rounding becomes as
much as a whole step of the learning rate where a gradient is nearly zero; with a large eps it stays a rounding.
"""

import json
from pathlib import Path

import pytest
import torch

import tuner
from tests.equivalence.conftest import (
    SMALL,
    SMALL_PPO,
    SMALL_REWARD,
    in_processes,
    in_two_processes,
    weights,
)
from tuner.config import GRPO, RLOO, override
from tuner.stages.run import Run

NF4 = {"model.quantization": "nf4"}
STEADY = {"optimizer.eps": 1e-2, "max_steps": 4, "gradient_checkpointing": True}
WITHOUT = ("seconds", "tokens_per_second", "memory_gib")
TIMES = "seconds/"

TRAIN = """
import json, os, sys, tuner
from pathlib import Path
from torch.distributed.tensor import DTensor
from tuner.config import from_json, override
from tuner.stages.context import Context
from tuner.training.step import Step

folder, names, rank = Path(sys.argv[1]), sys.argv[2:], os.environ["RANK"]

hold = Context.hold_together
def holding(self, roles):
    hold(self, roles)
    frozen = [w for loaded in roles.models for w in loaded.model.parameters() if not w.requires_grad]
    local = [w.to_local() if isinstance(w, DTensor) else w for w in frozen]
    held[self.run.folder.name] = sum(w.nbytes for w in local) / sum(w.nbytes for w in frozen)
Context.hold_together = holding

class Killed(BaseException):
    pass

finish = Step.finish
def finishing(self):
    finish(self)
    if self.index == kill_after:
        raise Killed
Step.finish = finishing

for name in names:
    held, kill_after = {}, None
    config = from_json((folder / f"{name}.json").read_text())
    for kill_after, shard in json.loads((folder / "kills.json").read_text()).get(name, []):
        try:
            tuner.train(override(config, {"parallel.shard": shard}), runs=folder / "two" / name)
        except Killed:
            pass
    if kill_after is None:
        tuner.train(config, runs=folder / "two" / name)
    (folder / f"{name}-{rank}.held").write_text(json.dumps(held))
"""
"""What each process does: train the configs that are named, and write down which part of frozen weights it held.

A name in kills.json is instead trained in the layouts named there, and killed after the step named beside each."""


def record(run: Run) -> list[dict]:
    """All that a run's steps were, but for times and memory."""
    return [
        {key: value for key, value in step.items() if key not in WITHOUT and not key.startswith(TIMES)}
        for step in run.metrics
    ]


def assert_same_bits(one: Run, other: Run) -> None:
    assert record(one) == record(other)
    assert one.samples == other.samples
    assert one.results == other.results
    assert one.answers == other.answers
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def assert_equal(one: Run, other: Run) -> None:
    """To the rounding of sums in another order."""
    for own, their in zip(record(one), record(other), strict=True):
        assert own["tokens"] == their["tokens"]
        # rounded once per pass, 6e-8, in weights that are off by a rounding as well
        assert own["loss"] == pytest.approx(their["loss"], rel=2e-6)
        assert own.get("eval_loss", 0.0) == pytest.approx(their.get("eval_loss", 0.0), rel=2e-6)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=1e-6)


@pytest.fixture(scope="session")
def policies(start) -> dict:
    """Each algorithm with roles on one 4-bit base: four; three; and three with a rank that has no row."""
    sft, reward = start("sft", NF4), start("reward", NF4)
    measured = {
        "prompts.test_files": [{"path": "tuner:sums/test.jsonl", "condition": "polite", "limit": 5}],
        "replay.test_files": [{"path": "tuner:sums/test.jsonl", "limit": 3}],
        "evaluation.every": 2,
        "max_steps": 3,
        "optimizer.eps": 1e-3,
        "gradient_checkpointing": True,
        "tokens_per_pass": 96,
    }
    ppo = override(SMALL_PPO, measured | {"policy.path": str(sft.folder), "reward.path": str(reward.folder)})
    shared = {name: getattr(ppo, name) for name in RLOO.model_fields if hasattr(ppo, name)}
    shared |= {"stage": "rloo", "prompts_per_step": 3, "answers_per_prompt": 2}
    one_row = {"prompts_per_step": 1, "tokens_per_pass": 2048}
    mini_batches = {
        "mini_batches": 2,
        "whiten_advantages": True,
        "entropy_bonus": 0.01,
        "mask_truncated": True,
    }
    return {
        "ppo": override(ppo, mini_batches),
        "grpo": GRPO(**shared | {"stage": "grpo", "kl_estimator": "k3"}),
        "rloo": override(RLOO(**shared), one_row),
    }


def test_two_processes_that_hold_one_base(policies, tmp_path):
    """In one launch, as importing costs more than training: every stage, and a run that moves between layouts."""
    chat = {"data.split.validation": 0.2, "evaluation.every": 2, "evaluation.samples": 3}
    chat |= {"evaluation.max_new_tokens": 5, "tokens_per_pass": 128}
    pairs = {
        "data.split.validation": 0.3,
        "evaluation.every": 2,
        "tokens_per_pass": 256,
        "data.max_length": 128,
    }
    pairs |= {"data.test_files": [{"path": "tuner:twins/test.jsonl", "limit": 17}]}
    configs = {
        "lora": override(SMALL, STEADY | chat),
        "nf4": override(SMALL, STEADY | chat | NF4),
        "idle": override(SMALL, STEADY | NF4 | {"tokens_per_step": 64, "tokens_per_pass": 64}),
        "reward": override(SMALL_REWARD, STEADY | pairs | NF4),
        **policies,
    }
    cases = {
        f"{name}-{shard}": override(config, {"parallel.shard": shard})
        for name, config in configs.items()
        for shard in (1, 2)
    }
    moving = override(configs["nf4"], {"checkpoint.every": 1})
    (tmp_path / "kills.json").write_text(json.dumps({"moving": [[0, 1], [2, 2]]}))
    in_two_processes(tmp_path, cases | {"moving": moving}, TRAIN, {"TUNER_CACHE": str(tmp_path / "cache")})
    for name, config in configs.items():
        replicated, sharded = (Run(tmp_path / "two" / f"{name}-{shard}" / config.name) for shard in (1, 2))
        assert sharded.read_json("versions")["processes"] == 2
        assert held(tmp_path, f"{name}-1", 2) == [1.0, 1.0]
        # small weights, such as norms of an odd length, are not cut into equal parts
        assert held(tmp_path, f"{name}-2", 2) == pytest.approx([0.5, 0.5], abs=0.02)
        assert_same_bits(replicated, sharded)
        assert_equal(tuner.train(config, runs=tmp_path / "one" / name), sharded)
    assert {step["passes"] for step in Run(tmp_path / "two/idle-2/small").metrics} == {1}
    assert {step["passes"] for step in Run(tmp_path / "two/nf4-2/small").metrics} == {5}  # three, and two
    # two processes, one of them idle, then in shards, then one process
    moved = Run(tmp_path / "two" / "moving" / "small")
    assert len(moved.metrics) == 3
    assert record(moved) == record(Run(tmp_path / "two/nf4-2/small"))[:3]
    assert_equal(tuner.train(moving, runs=tmp_path / "two" / "moving"), Run(tmp_path / "one/nf4/small"))


def test_replicas_of_shards(tmp_path):
    """Four processes, of which two and two hold the base."""
    configs = {"nf4": override(SMALL, STEADY | NF4 | {"tokens_per_pass": 128, "parallel.shard": 2})}
    (tmp_path / "kills.json").write_text("{}")
    in_processes(4, tmp_path, configs, TRAIN)
    four = Run(tmp_path / "two" / "nf4" / "small")
    assert four.read_json("versions")["processes"] == 4
    assert held(tmp_path, "nf4", 4) == pytest.approx([0.5] * 4, abs=0.02)
    whole = override(configs["nf4"], {"parallel.shard": 1})
    assert_equal(tuner.train(whole, runs=tmp_path / "one"), four)


def held(folder: Path, name: str, processes: int) -> list[float]:
    """Of the frozen weights' bytes, the part that each process held."""
    files = [folder / f"{name}-{rank}.held" for rank in range(processes)]
    return [part for file in files for part in json.loads(file.read_text()).values()]
