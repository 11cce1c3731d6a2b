"""What layers compute again, through whole runs: every way to the last bit, MLPs in tiles to rounding; in layouts, too.

Three layers, so that inputs wait in host memory while others are computed.
"""

import json

import pytest
import torch

import tuner
from tests.equivalence.conftest import SMALL, SMALL_PPO, SMALL_REWARD, in_two_processes
from tests.equivalence.test_resume import Killed, kill_at
from tests.equivalence.test_sharding import ROWS, SHARDS, TRAIN, assert_equal, assert_same_bits
from tests.shallow_models import first_layers, shallow
from tuner.config import override
from tuner.errors import UserError
from tuner.stages.run import Run

WAYS = (True, "selective", "offload")
LAYERS = {"model.path": shallow(3)}
QLORA = {"model.quantization": "nf4", "adapter.dropout": 0.1}
STEADY = {"optimizer.eps": 1e-2, "max_steps": 3}
FULL = {"adapter": None, "optimizer.lr": 1e-3}
TILE = {"mlp_tile": 48}
SFT = override(SMALL, LAYERS | STEADY | {"tokens_per_pass": 128})
REWARD = override(SMALL_REWARD, LAYERS | STEADY | {"tokens_per_pass": 256, "data.max_length": 128})


def recomputed(config, way):
    return override(config, {"gradient_checkpointing": way})


def ppo(start, precision="fp32"):
    """Four roles on one 4-bit base, with dropout and replay."""
    changes = LAYERS | QLORA | {"precision": precision}
    starts = {
        f"{role}.path": str(start(kind, changes).folder)
        for role, kind in (("policy", "sft"), ("reward", "reward"))
    }
    steps = {"optimizer.eps": 1e-3, "max_steps": 2, "mini_batches": 2, "update_epochs": 2}
    return override(SMALL_PPO, starts | steps | {"precision": precision})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["sft", "sft-full", "reward", "ppo"])
def test_every_way_gives_the_same_bits(start, tmp_path, monkeypatch, stage, precision):
    monkeypatch.setattr("tuner.models.arithmetic.computes_in_bf16", lambda device: True)
    configs = {
        "sft": override(SFT, QLORA),
        "sft-full": override(SFT, FULL),
        "reward": override(REWARD, QLORA),
    }
    config = override(configs[stage], {"precision": precision}) if stage in configs else ppo(start, precision)
    kept, *others = (tuner.train(recomputed(config, way), runs=tmp_path / str(way)) for way in (False, *WAYS))
    assert len(kept.metrics) == config.max_steps
    for other in others:
        assert_same_bits(kept, other)


def test_a_killed_run_goes_on_with_another(tmp_path):
    """Three times another, with dropout on a 4-bit base."""
    config = override(SFT, QLORA | {"checkpoint.every": 1, "max_steps": 4})
    whole = tuner.train(recomputed(config, False), runs=tmp_path / "whole")
    for step, way in enumerate(WAYS):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step, before_finish=False)
            with pytest.raises(Killed):
                tuner.train(recomputed(config, way), runs=tmp_path / "killed")
    assert_same_bits(whole, tuner.train(recomputed(config, False), runs=tmp_path / "killed"))


@pytest.mark.parametrize("way", [False, *WAYS])
@pytest.mark.parametrize("kind", ["full", "reward", "nf4"])
def test_tiles_change_rounding_alone(tmp_path, kind, way):
    config = {
        "full": override(SFT, FULL),
        "reward": override(REWARD, {"model.quantization": "nf4"}),
        "nf4": override(SFT, {"model.quantization": "nf4"}),
    }[kind]
    whole = tuner.train(config, runs=tmp_path / "whole")
    tiled = tuner.train(recomputed(override(config, TILE), way), runs=tmp_path / "tiled")
    assert_equal(whole, tiled)


def test_tiles_bind_a_resumed_run(tmp_path):
    config = override(SFT, {"checkpoint.every": 1})
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 0, before_finish=False)
        with pytest.raises(Killed):
            tuner.train(config, runs=tmp_path)
    with pytest.raises(UserError, match="mlp_tile"):
        tuner.train(override(config, TILE), runs=tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_a_tied_head_and_a_sliding_window(tmp_path, way):
    """Mistral's attention looks at 16 tokens of rows of 40 and more; input embedding and head are one weight."""
    folder = windowed(tmp_path)
    config = override(SFT, FULL | {"model.path": str(folder), "data.template": "internlm2"})
    kept = tuner.train(config, runs=tmp_path / "kept")
    assert_same_bits(kept, tuner.train(recomputed(config, way), runs=tmp_path / "again"))
    assert_equal(kept, tuner.train(recomputed(override(config, TILE), way), runs=tmp_path / "tiled"))


def windowed(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = first_layers(tmp_path / "windowed", 1)
    settings = json.loads((folder / "config.json").read_text())
    kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "sliding_window": 16, "tie_word_embeddings": True}
    shape |= {name: settings[name] for name in kept if settings.get(name) is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **shape))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def test_in_layouts(start, tmp_path):
    """Two processes with weights in shards, and with rows in parts."""
    cases = {}
    bases = {
        "nf4": override(SFT, QLORA),
        "full": override(SFT, FULL),
        "ppo": override(ppo(start), {"max_steps": 1}),
    }
    layouts = {"shards": SHARDS, "rows": ROWS}
    for base, config in bases.items():
        for layout, changes in layouts.items():
            for way in (False, *WAYS) if base != "ppo" else (False, "selective", "offload"):
                cases[f"{base}-{layout}-{way}"] = recomputed(override(config, changes), way)
    for base in ("nf4", "full"):  # a tile draws its own dropout
        plain = override(bases[base], {} if base == "full" else {"adapter.dropout": 0.0})
        cases[f"{base}-whole"] = plain
        for layout, changes in layouts.items():
            for way in ("selective", "offload"):
                cases[f"{base}-{layout}-{way}-tiled"] = recomputed(override(plain, changes | TILE), way)
    (tmp_path / "kills.json").write_text("{}")
    one = {
        name: tuner.train(config, runs=tmp_path / "one" / name)
        for name, config in cases.items()
        if "whole" in name
    }
    cases = {name: config for name, config in cases.items() if name not in one}
    in_two_processes(tmp_path, cases, TRAIN, {"TUNER_CACHE": str(tmp_path / "cache")})

    def two(name):
        return Run(tmp_path / "two" / name / cases[name].name)

    for name in cases:
        base, layout, way, *tiled = name.split("-")
        if tiled:
            assert_equal(one[f"{base}-whole"], two(name))
        else:
            assert_same_bits(two(f"{base}-{layout}-False"), two(name))
