"""`memory` chooses settings and nothing else: its run is the one with these settings written out, to the last bit."""

import json
from pathlib import Path

import pytest
import torch

import tuner
from tests.equivalence.conftest import TRAIN, curve, in_two_processes, weights
from tuner.config import DPO, GRPO, KTO, RLOO, Preferences, StageConfig, override
from tuner.errors import UserError
from tuner.stages.memory_choice import as_trained
from tuner.stages.memory_savings import RESERVE_GIB
from tuner.stages.registry import stage_of
from tuner.stages.run import Run
from tuner.training.devices import Devices
from tuner.training.step import Step
from tuner.training.watchers import Watcher

RECOMPUTES = {"gradient_checkpointing": True}


def peaks(config, processes=1):
    """(settings, planned peak in GiB) of every rung, by the plan that `tuner check --memory` shows."""
    stage = stage_of(config)
    plan_of = stage.memory_plans(config)
    ladder = stage.memory_options(config, processes).ladder()
    return [(settings, plan_of(override(config, settings)).peak / 2**30) for settings in ladder]


def size_for(config, rung, processes=1):
    """A size that this rung fits, and none before it."""
    *before, (_, peak) = peaks(config, processes)[: rung + 1]
    least = min(peak for _, peak in before)
    assert peak < least
    return f"{RESERVE_GIB + (peak + least) / 2:.9f}GiB"


def size_below_the_first(config):
    """A size that the first rung which needs less than all before it fits."""
    planned = [peak for _, peak in peaks(config)]
    return size_for(
        config, next(rung for rung, peak in enumerate(planned) if rung and peak < min(planned[:rung]))
    )


class Looking(Watcher):
    """Keeps the config that the loop trains with."""

    config: StageConfig

    def begin(self, folder, config, step, total_steps):
        self.config = config


def trained_with(config, folder):
    looking = Looking()
    return tuner.train(config, runs=folder, watchers=[looking]), looking.config


@pytest.fixture
def configs(small, start, ppo):
    """A config of each stage, whose rows fit smaller passes."""
    reward = override(start("reward").config, {"data.max_length": 96, "max_steps": 2, "checkpoint.every": 1})
    policy = ppo({"max_steps": 2})
    shared = ("policy", "adapter", "reward", "prompts", "sampling", "replay", "optimizer", "evaluation")
    parts = {name: getattr(policy, name) for name in (*shared, "tokens_per_pass", "precision", "max_steps")}
    group = {**parts, "prompts_per_step": 4, "answers_per_prompt": 2, "gradient_checkpointing": False}
    return {
        "sft": small({"max_steps": 2}),
        "reward": reward,
        "ppo": policy,
        "grpo": GRPO(name="grpo", kl_estimator="k3", **group),
        "rloo": RLOO(name="rloo", **group),
    }


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "grpo", "rloo"])
def test_the_run_is_the_one_with_its_settings_written_out(configs, stage, tmp_path):
    config = configs[stage]
    rung = 3
    expected, peak = peaks(config)[rung]
    assert expected["gradient_checkpointing"]
    assert expected["tokens_per_pass"] < config.tokens_per_pass
    sized = override(config, {"memory": size_for(config, rung)})
    run, seen = trained_with(sized, tmp_path / "chosen")
    for path, value in expected.items():
        assert getattr(seen, path) == value
    record = run.read_json("memory")
    assert record["planned_gib"] == pytest.approx(peak)
    assert record["settings"] | expected == record["settings"]
    assert run.config == sized
    assert as_trained(run) == override(sized, record["settings"])
    log = (run.folder / "log.txt").read_text()
    assert f"→ tokens_per_pass={expected['tokens_per_pass']}, gradient_checkpointing=true" in log
    written = tuner.train(override(config, record["settings"]), runs=tmp_path / "written")
    assert [record["loss"] for record in run.metrics] == [record["loss"] for record in written.metrics]
    assert all(torch.equal(tensor, weights(written)[name]) for name, tensor in weights(run).items())
    assert written.read_json("memory") is None


@pytest.mark.parametrize("kind", [DPO, KTO])
def test_trl_only_recomputes(small, kind, tmp_path):
    """Its passes are part of the result."""
    pair = {
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "chosen": [{"role": "assistant", "content": "2"}],
        "rejected": [{"role": "assistant", "content": "3"}],
    }
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(pair | {"id": number}) + "\n" for number in range(8)))
    size = {DPO: {"pairs_per_step": 4}, KTO: {"answers_per_step": 8}}[kind]
    config = kind(
        name="trl",
        model=small().model,
        adapter=small().adapter,
        data=Preferences(files=(str(rows),), template="internlm2", max_length=32),
        max_steps=1,
        precision="fp32",
        gradient_checkpointing=False,
        device="cpu",
        **size,
    )
    assert [settings for settings, _ in peaks(config)] == [{"gradient_checkpointing": False}, RECOMPUTES]
    _, seen = trained_with(override(config, {"memory": size_for(config, 1)}), tmp_path)
    assert seen == override(config, {"memory": seen.memory, **RECOMPUTES})


class Killed(BaseException):
    """Stands for a kill that leaves no time to clean up."""


def train_killed(config, folder, step):
    finish = Step.finish

    def killed(self):
        if self.index == step:
            raise Killed
        finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "finish", killed)
        with pytest.raises(Killed):
            tuner.train(config, runs=folder)


def free(monkeypatch, gib):
    """As a GPU would say how much is free: the only part of "auto" that needs one."""
    monkeypatch.setattr(Devices, "free_gib", lambda self: gib)


def test_a_resumed_run_keeps_its_choice_whatever_is_free_then(small, tmp_path, monkeypatch):
    config = small({"adapter.dropout": 0.1, "checkpoint.every": 1})
    least, most = (float(size_for(config, rung).removesuffix("GiB")) for rung in (3, 1))
    auto = override(config, {"memory": "auto"})
    free(monkeypatch, least)
    whole = tuner.train(auto, runs=tmp_path / "whole")
    train_killed(auto, tmp_path / "killed", 3)
    free(monkeypatch, most)
    resumed = tuner.train(auto, runs=tmp_path / "killed")
    assert curve(resumed) == curve(whole)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    log = (resumed.folder / "log.txt").read_text()
    assert log.count(f"memory {least:.1f} GiB free → tokens_per_pass=256") == 2
    assert log.count(", as this run began") == 1
    # where no step was taken yet, what is free now counts
    train_killed(auto, tmp_path / "early", 0)
    free(monkeypatch, least)
    early = tuner.train(auto, runs=tmp_path / "early")
    assert early.read_json("memory")["settings"]["tokens_per_pass"] == 256


def test_another_size_chooses_anew(small, tmp_path):
    config = small({"checkpoint.every": 1})
    larger, smaller = (override(config, {"memory": size_for(config, rung)}) for rung in (1, 3))
    train_killed(larger, tmp_path, 3)
    assert Run(tmp_path / "small").read_json("memory")["settings"]["tokens_per_pass"] == 512
    run = tuner.train(smaller, runs=tmp_path)
    assert run.read_json("memory")["settings"]["tokens_per_pass"] == 256
    assert run.metrics[-1]["passes"] > run.metrics[0]["passes"]


LEAST_OF_ALL = (
    """
import os
from tuner.training.devices import Devices
free = float(os.environ["FREE"]), float(os.environ["LESS"])
Devices.free_gib = lambda self: free[self.rank]
"""
    + TRAIN
)


def test_processes_choose_together(small, tmp_path):
    """A process's part of a step is 256 tokens: passes are no larger. "auto" counts what is free of the fullest."""
    config = small({"max_steps": 2})
    ladder = [settings for settings, _ in peaks(config, 2)]
    assert ladder[0] == {"tokens_per_pass": 256, "gradient_checkpointing": False}
    more, less = (size_for(config, rung, 2) for rung in (1, 3))
    cases = {
        "sized": override(config, {"memory": more}),
        "auto": override(config, {"memory": "auto"}),
        **{f"written_{rung}": override(config, ladder[rung]) for rung in (1, 3)},
    }
    env = {"FREE": more.removesuffix("GiB"), "LESS": less.removesuffix("GiB")}
    in_two_processes(tmp_path, cases, LEAST_OF_ALL, env)
    runs = {name: Run(tmp_path / "two" / name / "small") for name in cases}
    for name, rung in (("sized", 1), ("auto", 3)):
        assert runs[name].read_json("memory")["settings"] == ladder[rung]
        assert curve(runs[name]) == curve(runs[f"written_{rung}"])


def test_rounds_choose_for_each_part(cool, tmp_path):
    config = cool()
    sizes = {"policy": size_below_the_first(config.policy), "reward": size_below_the_first(config.reward)}
    changes = {f"{part}.memory": size for part, size in sizes.items()}
    run = tuner.train(override(config, changes), runs=tmp_path)
    for folder, part in (("round_1/ppo", "policy"), ("round_2/reward", "reward"), ("round_2/ppo", "policy")):
        record = Run(run.folder / folder).read_json("memory")
        assert record["memory"] == sizes[part]
        assert record["settings"]["gradient_checkpointing"]


def test_no_size_that_fits_is_a_sentence(small, tmp_path):
    config = small({"memory": "1GiB"})
    with pytest.raises(UserError) as raised:
        tuner.train(config, runs=tmp_path)
    text = str(raised.value)
    assert text.startswith("memory='1GiB': the smallest planned peak is 0.01 GiB, with tokens_per_pass=64, ")
    assert "gradient_checkpointing=true," in text  # on a CPU nothing waits elsewhere
    assert not (tmp_path / "small").exists()


def test_auto_needs_a_gpu(small, tmp_path):
    with pytest.raises(
        UserError, match='memory="auto" is what the GPU has free, and this run computes on a CPU'
    ):
        tuner.train(small({"memory": "auto", "device": "cpu"}), runs=tmp_path)


@pytest.mark.parametrize("damage", [{"settings": 3}, {"planned_gib": "much"}, {"room_gib": None}])
def test_a_damaged_record_is_named(small, tmp_path, damage):
    config = small({"checkpoint.every": 1, "memory": "2GiB"})
    train_killed(config, tmp_path, 3)
    file = Path(tmp_path, "small", "memory.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(UserError, match=r"memory\.json: no choice of settings; restore it, or remove it"):
        tuner.train(config, runs=tmp_path)
    file.unlink()
    assert tuner.train(config, runs=tmp_path).is_finished


def test_full_memory_says_which_size_chooses_less(small, tmp_path, monkeypatch):
    config = small({"memory": "2GiB"})

    def fail(self, *_):
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "finish", fail)
        with pytest.raises(
            UserError, match="memory is full; memory='2GiB' chose tokens_per_pass=512, "
        ) as raised:
            tuner.train(config, runs=tmp_path)
    assert "write a size below 1.01GiB, and the same run goes on" in str(raised.value)
    run = tuner.train(override(config, {"memory": "1.0095GiB"}), runs=tmp_path)
    assert run.read_json("memory")["settings"] != {"tokens_per_pass": 512, "gradient_checkpointing": False}
