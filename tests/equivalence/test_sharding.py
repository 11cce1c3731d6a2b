"""Layouts: processes that hold frozen weights, or compute rows, together train what one process would.

Replicated and in shards, the same processes add the same numbers in the same order: they are compared bit for bit. One
process, and processes that compute rows together, add them in another order. Adam divides by the square root of small
squares, so that a rounding becomes as much as a whole step of the learning rate where a gradient is nearly zero; with a
large eps it stays a rounding.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tuner
from tests.equivalence.conftest import SMALL as ONE_LAYER
from tests.equivalence.conftest import SMALL_PPO, in_processes, in_two_processes, weights
from tests.equivalence.conftest import SMALL_REWARD as ONE_LAYER_REWARD
from tests.shallow_models import shallow
from tuner.config import GRPO, RLOO, override
from tuner.stages.end_run import end_run
from tuner.stages.run import Run

TWO_LAYERS = {"model.path": shallow(2)}
SMALL, SMALL_REWARD = (override(one, TWO_LAYERS) for one in (ONE_LAYER, ONE_LAYER_REWARD))
NF4 = {"model.quantization": "nf4"}
STEADY = {"optimizer.eps": 1e-2, "max_steps": 3, "gradient_checkpointing": True}
SHARDS, ROWS = {"parallel.shard": 2}, {"parallel.sequence": 2}
WITHOUT = ("seconds", "tokens_per_second", "memory_gib")
TIMES = "seconds/"

TRAIN = """
import json, os, sys, threading, tuner
from pathlib import Path
from torch.distributed.tensor import DTensor
from tuner.config import from_json, override
from tuner.errors import UserError
from tuner.stages.context import Context
from tuner.training.step import Step

folder, names, rank = Path(sys.argv[1]), sys.argv[2:], os.environ["RANK"]

lay_out = Context.lay_out
def laying_out(self, roles):
    lay_out(self, roles)
    frozen = [w for loaded in roles.models for w in loaded.model.parameters() if not w.requires_grad]
    local = [w.to_local() if isinstance(w, DTensor) else w for w in frozen]
    held[self.run.folder.name] = sum(w.nbytes for w in local) / max(1, sum(w.nbytes for w in frozen))
Context.lay_out = laying_out

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
    for kill_after, layout in json.loads((folder / "kills.json").read_text()).get(name, []):
        try:
            tuner.train(override(config, layout), runs=folder / "two" / name)
        except (Killed, UserError) as end:
            with (folder / f"{name}-{rank}.ends").open("a") as file:
                file.write(f"{type(end).__name__}: {end}\\n")
        # a killed process leaves no thread that goes on writing
        for thread in set(threading.enumerate()) - {threading.current_thread()}:
            if not thread.daemon:
                thread.join()
    if kill_after is None:
        tuner.train(config, runs=folder / "two" / name)
    (folder / f"{name}-{rank}.held").write_text(json.dumps(held))
"""
"""What each process does: train the configs that are named, and write down which part of frozen weights it held.

A name in kills.json is instead trained in the layouts named there, and killed after the step named beside each; how
each of these runs ended is written down."""


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
        if own["loss"] is None:  # a step whose answers were all cut off, which `mask_truncated` leaves out
            assert their["loss"] is None
        else:  # rounded once per pass, 6e-8, in weights that are off by a rounding as well
            assert own["loss"] == pytest.approx(their["loss"], rel=2e-6)
        assert own.get("eval_loss", 0.0) == pytest.approx(their.get("eval_loss", 0.0), rel=2e-6)
    assert any(step["loss"] is not None for step in record(one))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=1e-6)


@pytest.fixture(scope="session")
def policies(start) -> dict:
    """Each algorithm with roles on one 4-bit base: four; three; and three with a rank that has no row."""
    sft, reward = (start(kind, TWO_LAYERS | NF4) for kind in ("sft", "reward"))
    measured = {
        "prompts.test_files": [{"path": "tuner:sums/test.jsonl", "condition": "polite", "limit": 5}],
        "replay.test_files": [{"path": "tuner:sums/test.jsonl", "limit": 3}],
        "evaluation.every": 2,
        "max_steps": 2,
        "optimizer.eps": 1e-3,
        "gradient_checkpointing": True,
        "tokens_per_pass": 96,
    }
    ppo = override(SMALL_PPO, measured | {"policy.path": str(sft.folder), "reward.path": str(reward.folder)})
    shared: dict[str, Any] = {name: getattr(ppo, name) for name in RLOO.model_fields if hasattr(ppo, name)}
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


@pytest.mark.timeout(1200)  # eighteen runs in a launch
def test_two_processes(policies, tmp_path):
    """In one launch, as importing costs more than training: every stage, and a run that moves between layouts."""
    # one sample: one of two processes generates nothing
    chat = {"data.split.validation": 0.2, "evaluation.every": 2, "evaluation.samples": 1}
    chat |= {"evaluation.max_new_tokens": 5, "tokens_per_pass": 128}
    pairs = {
        "data.split.validation": 0.3,
        "evaluation.every": 2,
        "tokens_per_pass": 256,
        "data.max_length": 128,
    }
    pairs |= {"data.test_files": [{"path": "tuner:twins/test.jsonl", "limit": 17}]}
    idle = {"tokens_per_step": 64, "tokens_per_pass": 64}
    modules = {
        "adapter.train_whole": ["embed_tokens", "lm_head"],
        "tokens_per_pass": 128,
        "optimizer.lr": 1e-3,
    }
    configs = {
        "nf4": override(SMALL, STEADY | chat | NF4),
        "idle": override(SMALL, STEADY | idle),
        "modules": override(SMALL, STEADY | modules | NF4),
        "reward": override(SMALL_REWARD, STEADY | pairs | NF4),
        **policies,
        "all-weights": override(SMALL, STEADY | chat | {"adapter": None, "optimizer.lr": 1e-3}),
    }
    of_bits, in_shards, of_rows = (
        ("nf4", "idle", "modules", "reward", "ppo"),
        ("nf4", "idle", "modules", "reward", "ppo", "grpo", "rloo"),
        ("nf4", "reward", "ppo", "all-weights"),
    )
    cases = {
        **{f"{name}-whole": configs[name] for name in of_bits},
        **{f"{name}-shards": override(configs[name], SHARDS) for name in in_shards},
        **{f"{name}-rows": override(configs[name], ROWS) for name in of_rows},
    }
    moving = override(configs["nf4"], {"checkpoint.every": 1})
    kills = {"moving": [[0, SHARDS], [1, SHARDS | ROWS]]}
    (tmp_path / "kills.json").write_text(json.dumps(kills))
    in_two_processes(tmp_path, cases | {"moving": moving}, TRAIN, {"TUNER_CACHE": str(tmp_path / "cache")})

    def two(case: str) -> Run:
        return Run(tmp_path / "two" / case / cases[case].name)

    for name in of_bits:
        assert held(tmp_path, f"{name}-whole", 2) == [1.0, 1.0]
        assert_same_bits(two(f"{name}-whole"), two(f"{name}-shards"))
    for name in in_shards:
        assert two(f"{name}-shards").read_json("versions")["processes"] == 2
        # small weights, such as norms of an odd length, are not cut into equal parts
        assert held(tmp_path, f"{name}-shards", 2) == pytest.approx([0.5, 0.5], abs=0.02)
    for name, config in configs.items():
        one = tuner.train(config, runs=tmp_path / "one" / name)
        for layout in ("shards", "rows"):
            if f"{name}-{layout}" in cases:
                assert_equal(one, two(f"{name}-{layout}"))
    assert {step["passes"] for step in two("idle-shards").metrics} == {1}
    assert {step["passes"] for step in two("nf4-shards").metrics} == {5}  # three, and two
    # killed in each of two layouts, then one process
    moved = Run(tmp_path / "two" / "moving" / "small")
    assert len(moved.metrics) == 2
    assert record(moved)[0] == record(two("nf4-shards"))[0]
    ended = end_run(shutil.copytree(moved.folder, tmp_path / "ended"))
    assert ended.has_ended
    assert len(ended.run.metrics) == 2
    assert ended.run.model_folder.is_dir()
    assert_equal(tuner.train(moving, runs=tmp_path / "two" / "moving"), Run(tmp_path / "one/nf4/small"))


def test_four_processes(tmp_path):
    """Two replicas of shards, which compute rows together; and more processes than heads of keys and values."""
    small = override(SMALL, STEADY | {"tokens_per_pass": 128})
    configs = {
        "replicas": override(small, NF4 | SHARDS | ROWS),
        "heads": override(small, {"parallel.sequence": 4}),
        "all-weights": override(small, SHARDS | ROWS | {"adapter": None, "optimizer.lr": 1e-3}),
    }
    (tmp_path / "kills.json").write_text("{}")
    in_processes(4, tmp_path, configs, TRAIN)
    assert held(tmp_path, "replicas", 4) == pytest.approx([0.5] * 4, abs=0.02)
    for name, config in configs.items():
        four = Run(tmp_path / "two" / name / "small")
        assert four.read_json("versions")["processes"] == 4
        alone = override(config, {"parallel": {}})
        assert_equal(tuner.train(alone, runs=tmp_path / "one" / name), four)


def held(folder: Path, name: str, processes: int) -> list[float]:
    """Of the frozen weights' bytes, the part that each process held."""
    files = [folder / f"{name}-{rank}.held" for rank in range(processes)]
    return [part for file in files for part in json.loads(file.read_text()).values()]
