"""All weights trained in shards: the same steps, checkpoints and models as of processes that hold the model whole.

Where each of two processes makes one pass a step, replicas and shards add the same two numbers: those are compared bit
for bit. More passes are added in another order (shards sum over processes pass by pass, replicas once), and compared to
rounding; see test_sharding.py on what that means.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import tuner
from tests.equivalence.conftest import SMALL_PPO, in_two_processes, weights
from tests.equivalence.test_sharding import (
    SHARDS,
    SMALL,
    SMALL_REWARD,
    STEADY,
    TRAIN,
    TWO_LAYERS,
    assert_equal,
    record,
)
from tuner.config import GRPO, Freeze, override
from tuner.stages.run import Run
from tuner.training.checkpoint_names import checkpoint_steps
from tuner.training.step import Step

ALL = STEADY | {"adapter": None, "optimizer.lr": 1e-3, "data.limit": 60}
ONE_PASS_EACH = {"tokens_per_step": 200, "tokens_per_pass": 110, "max_steps": 2, "max_grad_norm": None}
"""Two passes a step; and no clipping, as a norm over shards is added in another order."""
WHOLE = {"parallel.shard": 1}

SCRIPT = f"""
import errno
import tuner.models.save
from transformers.distributed.sharding_utils import DtensorShardOperation
from tuner.training.snapshot import TensorFile

tuner.models.save._FILE_BYTES = 400_000  # several files of a tiny model in shards

write, torn = TensorFile.write, []
def writing(self, path):
    if name == "torn" and rank == "1" and "step_000002" in str(path) and not torn:
        torn.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")
    write(self, path)
TensorFile.write = writing

read, shard_tensor = {{}}, DtensorShardOperation.shard_tensor
def reading(self, *arguments, **settings):
    tensor = shard_tensor(self, *arguments, **settings)
    read[name] = read.get(name, 0) + tensor.numel()
    return tensor
DtensorShardOperation.shard_tensor = reading
{TRAIN}
(folder / f"read-{{rank}}.json").write_text(json.dumps(read))
"""
"""As in test_sharding.py; the run `torn` cannot write one process's part of its second checkpoint at first. Written
down are also the numbers that each process read of the models that it loaded."""


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A Llama whose head is its embedding, with the tokenizer of the embedded model."""
    folder = tmp_path_factory.mktemp("tied")
    sizes = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in Path(TWO_LAYERS["model.path"]).glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.timeout(1200)
def test_two_processes(tied, start, tmp_path, monkeypatch):
    """In one launch: every stage, optimizers, a run that moves between layouts, and a checkpoint that is torn."""
    small = override(SMALL, ALL | {"tokens_per_step": 256, "tokens_per_pass": 64})
    full = override(small, {"data.split.validation": 0.2, "evaluation.every": 1, "max_steps": 2})
    full = override(full, {"max_grad_norm": 0.5})
    reward = override(SMALL_REWARD, ALL | {"tokens_per_pass": 256, "data.max_length": 128, "max_steps": 2})
    reward = override(reward, {"data.test_files": [{"path": "tuner:twins/test.jsonl", "limit": 1}]})
    # held-out passes without gradients between the steps: what is outside of layers must not stay gathered after them
    # (in SFT all is gathered for samples after them, and put back)
    reward = override(reward, {"data.split.validation": 0.3, "evaluation.every": 1})
    of_roles = {
        "policy.path": TWO_LAYERS["model.path"],
        "reward.path": str(start("reward", TWO_LAYERS | {"max_steps": 1}).folder),
    }
    of_roles |= {"roles": "separate", "adapter": None, "tokens_per_pass": 96, "max_steps": 2}
    ppo = override(SMALL_PPO, STEADY | of_roles)
    of_group: dict[str, Any] = {name: getattr(ppo, name) for name in GRPO.model_fields if hasattr(ppo, name)}
    of_group |= {"stage": "grpo", "prompts_per_step": 3, "answers_per_prompt": 2, "kl_estimator": "k3"}
    equal = {
        "full": override(full, {"freeze": Freeze(names=("model.layers.0.*",))}),
        "reward": reward,
        "ppo": ppo,
        "grpo": GRPO(**of_group),
    }
    each = override(small, ONE_PASS_EACH)
    same = {
        "eight": override(each, {"optimizer.bits": 8}),
        "tied": override(each, {"model.path": str(tied)}),
    }
    saving = override(small, {"checkpoint.every": 1, "checkpoint.keep": 9, "max_steps": 4})
    cases = {
        **{f"{name}-shards": override(config, SHARDS) for name, config in (equal | same).items()},
        **{f"{name}-whole": config for name, config in same.items()},
        "moving": saving,
        "torn": saving,
    }
    kills = {"moving": [[2, SHARDS], [2, WHOLE]], "torn": [[99, SHARDS], [99, SHARDS]]}
    (tmp_path / "kills.json").write_text(json.dumps(kills))
    begin_and_kill(saving, tmp_path / "two" / "moving", monkeypatch)
    in_two_processes(tmp_path, cases, SCRIPT, {"TUNER_CACHE": str(tmp_path / "cache")})

    def two(case: str) -> Run:
        return Run(tmp_path / "two" / case / cases[case].name)

    def ends(case: str) -> list[list[str]]:
        return [(tmp_path / f"{case}-{rank}.ends").read_text().splitlines() for rank in (0, 1)]

    for name, config in equal.items():
        assert_equal(tuner.train(config, runs=tmp_path / "one" / name), two(f"{name}-shards"))
    for name in same:
        assert {step["passes"] for step in two(f"{name}-whole").metrics} == {2}
        assert steps_of(two(f"{name}-shards")) == steps_of(two(f"{name}-whole"))
        saved, in_shards = weights(two(f"{name}-whole")), weights(two(f"{name}-shards"))
        assert saved.keys() == in_shards.keys()
        assert all(torch.equal(tensor, in_shards[weight]) for weight, tensor in saved.items())
        assert_whole_index(two(f"{name}-shards").model_folder, set(saved))
        # loaded by slice: each process has read its half
        size = sum(tensor.numel() for tensor in saved.values())
        counts = [json.loads((tmp_path / f"read-{rank}.json").read_text()) for rank in (0, 1)]
        assert [count[f"{name}-shards"] / size for count in counts] == pytest.approx([0.5, 0.5], abs=0.01)
    # all processes are told, none takes the torn checkpoint for one, and the run goes on from the one before
    assert all(len(lines) == 1 and "the disk is full" in lines[0] for lines in ends("torn"))
    assert_each_wrote_its_part(two("torn"))
    # one process, two in shards, two that hold all, and one again
    assert all(line.startswith("Killed") for lines in ends("moving") for line in lines)
    one = tuner.train(saving, runs=tmp_path / "one" / "moving")
    assert_equal(one, tuner.train(saving, runs=tmp_path / "two" / "moving"))
    assert_equal(one, two("torn"))


def begin_and_kill(config, runs: Path, monkeypatch) -> None:
    """The first step of a run in this process."""
    finish = Step.finish

    class Killed(BaseException):
        pass

    def finishing(self):
        finish(self)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Step, "finish", finishing)
        with pytest.raises(Killed):
            tuner.train(config, runs=runs)


def steps_of(run: Run) -> list[dict]:
    """What a run's steps were, but for the norms, which shards add in another order."""
    return [{key: value for key, value in step.items() if key != "grad_norm"} for step in record(run)]


def assert_whole_index(folder: Path, names: set[str]) -> None:
    """The files and their index hold each weight once."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == names
    assert len(set(index.values())) == len(list(folder.glob("*.safetensors"))) > 1
    for file in set(index.values()):
        with safe_open(folder / file, "pt") as opened:
            assert set(opened.keys()) == {name for name, place in index.items() if place == file}


def assert_each_wrote_its_part(run: Run) -> None:
    """Half of the weights is in each of two processes' files, and all of them in both."""
    assert checkpoint_steps(run.checkpoints_folder) == [1, 2, 3, 4]
    files = sorted(run.checkpoints_folder.glob("step_000003/trained*"))
    assert [file.name for file in files] == [
        f"trained-0000{number}-of-00002.safetensors" for number in (1, 2)
    ]
    sizes = [file.stat().st_size for file in files]
    assert min(sizes) > 0.9 * max(sizes)
    assert not list(run.checkpoints_folder.glob("*/*.pt"))
