"""What PPO's configs are said to need, counted on the real shapes; nothing here was measured on a device."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tuner.algorithms.algorithm import algorithm_of
from tuner.config import LoRA, Model, load_config, override
from tuner.data.template import Template
from tuner.models.base_record import write_record
from tuner.models.internlm2 import InternLM2Config
from tuner.models.load import Loaded, load_model
from tuner.models.load_roles import load_policy_roles
from tuner.models.memory import MemoryBudget, memory_plan
from tuner.models.tokenizer import read_tokenizer, save_tokenizer
from tuner.resources import configs_folder, locate
from tuner.stages.rl.check import policy_memory
from tuner.stages.rl.models import policy_models

META = torch.device("meta")

# InternLM2 report, table 2, and the released config.json of each
SHAPES = {
    "1_8b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "20b": {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 48,
    },
}


def model_folder(folder: Path, shape: dict[str, int], architecture: str = "InternLM2ForCausalLM") -> Path:
    """A model's folder without its weights."""
    folder.mkdir()
    settings = InternLM2Config(vocab_size=92_544, num_key_value_heads=8, **shape)
    settings.architectures = [architecture]
    settings.save_pretrained(folder)
    tokenizer = read_tokenizer(Path(locate("tuner:tiny")))
    tokenizer.chat_template = Template("internlm2", tokenizer).source
    save_tokenizer(tokenizer, folder)
    return folder


def reward_adapter(folder: Path, base: Path, lora: LoRA, quantization: str | None) -> Path:
    """The folder of a reward model that was trained as an adapter, without its weights."""
    model = Model(path=str(base), quantization=quantization)
    loaded = load_model(model, precision="bf16", device=META, adapter=lora, head="score")
    folder.mkdir()
    loaded.model.peft_config["default"].save_pretrained(str(folder))
    for file in base.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(base / "chat_template.jinja", folder)
    write_record(folder, replace(loaded.base, path=str(base)), lora)
    (folder / "reward.json").write_text(json.dumps({"reward_token": "[UNUSED_TOKEN_130]"}))
    return folder


def peak_bytes(budget: MemoryBudget, models: list[Loaded]) -> float:
    """The plan's peak, whose terms add up to it."""
    plan = memory_plan(budget, models)
    assert min(plan.terms.values()) > 0
    assert plan.peak == pytest.approx(sum(plan.terms.values()))
    return plan.peak


@pytest.mark.parametrize(
    ("size", "weights", "gib"), [("1_8b", 1.89, 58), ("7b", 7.74, 21), ("20b", 19.86, 48)]
)
def test_policy_peak_is_what_the_config_says(size, weights, gib, tmp_path):
    config = load_config(f"internlm2_{size}_ppo")
    assert f"an estimated {gib} GiB" in (configs_folder() / f"internlm2_{size}_ppo.py").read_text("utf-8")
    base = model_folder(tmp_path / "base", SHAPES[size])
    quantization = config.policy.quantization
    if config.adapter is None:
        reward = model_folder(tmp_path / "reward", SHAPES[size], "InternLM2ForRewardModel")
    else:
        reward = reward_adapter(tmp_path / "reward", base, LoRA(), quantization)
    config = override(config, {"policy.path": str(base), "reward.path": str(reward), "policy.revision": None})
    roles = load_policy_roles(policy_models(config, algorithm_of(config).roles), META, nullcontext).roles
    assert len(roles.models) == (4 if config.adapter is None else 1)
    counted = sum(
        weight.numel() for name, weight in roles.loaded.model.named_parameters() if "lora" not in name
    )
    assert counted / 1e9 == pytest.approx(weights, abs=0.01)
    assert round(policy_memory(config, algorithm_of(config), roles).peak / 2**30) == gib


@pytest.mark.parametrize(
    ("name", "gib"),
    [("internlm2_7b_qlora", 7.87), ("internlm2_7b_full", 111.02), ("internlm2_7b_reward_qlora", 8.71)],
)
def test_one_model_of_seven_billion_weights(name, gib, tmp_path):
    """The 4-bit base and an adapter's training state; or weights, gradients and 8-bit state of all weights."""
    config = load_config(name)
    base = model_folder(tmp_path / "base", SHAPES["7b"])
    model = Model(path=str(base), quantization=config.model.quantization)
    loaded = load_model(model, precision=config.precision, device=META, adapter=config.adapter)
    budget = MemoryBudget(
        precision=config.precision,
        optimizer_bits=config.optimizer.bits,
        tokens_per_pass=config.tokens_per_pass,
        gradient_checkpointing=config.gradient_checkpointing,
        adapter_dropout=0.0 if config.adapter is None else config.adapter.dropout,
        language_head=config.stage == "sft",
    )
    assert peak_bytes(budget, [loaded]) / 2**30 == pytest.approx(gib, rel=0.001)


def test_shards_of_twenty_billion_weights_by_hand(tmp_path):
    """Packed weights are shared by the processes, but for what a pass gathers; scales and trained weights are not."""
    layer = 2 * 6144**2 + 2 * 6144 * 1024 + 3 * 6144 * 16384  # q and o, k and v, the MLP's three
    packed_layer = layer / 2 + 2 * (4 * 6144 + 2 * 1024)  # and in bf16 two norms, and attention's four biases
    outside = (2 * 92_544 * 6144 + 6144) * 2  # embedding, head and last norm in bf16
    base = model_folder(tmp_path / "base", SHAPES["20b"])
    model = Model(path=str(base), quantization="nf4")
    loaded = load_model(model, precision="bf16", device=META, adapter=LoRA(r=64))
    budget = MemoryBudget("bf16", 8, 16_384, True, adapter_dropout=0.0, language_head=True)
    whole = peak_bytes(budget, [loaded])
    for shards in (2, 8):
        saved = (48 * packed_layer + outside) * (1 - 1 / shards) - outside - 2 * packed_layer
        assert whole - peak_bytes(replace(budget, shards=shards), [loaded]) == pytest.approx(saved, rel=1e-6)
    # where activations are small, a device must have room for the base as it generates
    small = replace(budget, tokens_per_pass=64)
    floor = [peak_bytes(replace(small, shards=shards), [loaded]) for shards in (4, 8)]
    assert floor[0] == floor[1] < peak_bytes(small, [loaded])
    # where it does not generate, no process ever holds it whole: what it gathers is the most
    silent = [peak_bytes(replace(small, shards=shards, generates=False), [loaded]) for shards in (4, 8)]
    assert silent[0] - silent[1] == pytest.approx((48 * packed_layer + outside) / 8, rel=1e-6)
    assert silent[0] < floor[0] - (48 * packed_layer + outside) / 4


def test_all_of_twenty_billion_weights_in_shards_by_hand(tmp_path):
    """A process holds an eighth of weights, gradients and moments, and what a pass gathers; never the whole model."""
    layer = 2 * 6144**2 + 2 * 6144 * 1024 + 3 * 6144 * 16384 + 2 * 6144 + 2 * 6144 + 2 * 1024
    outside = 2 * 92_544 * 6144 + 6144
    model = Model(path=str(model_folder(tmp_path / "base", SHAPES["20b"])))
    loaded = load_model(model, precision="bf16", device=META)
    budget = MemoryBudget(
        "bf16", 8, 4096, True, adapter_dropout=0.0, language_head=False, generates=False, shards=8
    )
    peak = peak_bytes(budget, [loaded])
    share = (48 * layer + outside) * (4 + 4 + 2) / 8
    # in fp32 weights, gradients and their sums, and copies in bf16; of the next layer the weights alone
    gathered = (outside + layer) * (4 + 4 + 4 + 2) + layer * 4
    # in one process copies are of matrices in layers, and the largest gradient is in flight in both dtypes
    matrices = 2 * 6144**2 + 2 * 6144 * 1024 + 3 * 6144 * 16384
    whole = peak_bytes(replace(budget, shards=1), [loaded])
    activations = whole - (48 * layer + outside) * (4 + 4 + 2) - 48 * matrices * 2 - 6144 * 16384 * (4 + 2)
    assert peak == pytest.approx(share + gathered + activations, rel=1e-9)
    assert peak < 80e9 < peak_bytes(replace(budget, shards=1), [loaded])
    # answers are generated by the whole model
    assert peak_bytes(replace(budget, generates=True), [loaded]) > (48 * layer + outside) * 4
