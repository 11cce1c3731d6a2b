"""What PPO's configs are said to need, counted on the real shapes; nothing here was measured on a device."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tuner.config import load_config
from tuner.models.adapters import add_adapter
from tuner.models.base_record import BaseReference
from tuner.models.internlm2 import InternLM2Config
from tuner.models.locate import Location
from tuner.models.memory import Weights
from tuner.resources import configs_folder
from tuner.stages.check import _policy_peak

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


@pytest.mark.parametrize(
    ("size", "weights", "said"), [("1_8b", 1.89, 65), ("7b", 7.74, 21), ("20b", 19.86, 47)]
)
def test_policy_peak_is_what_the_config_says(size, weights, said, tmp_path):
    config = load_config(f"internlm2_{size}_ppo")
    assert f"{said} GiB by counting" in (configs_folder() / f"internlm2_{size}_ppo.py").read_text("utf-8")
    shape = InternLM2Config(vocab_size=92_544, num_key_value_heads=8, **SHAPES[size])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(
        weights, abs=0.01
    )
    model.requires_grad_(config.adapter is None)
    counted = Weights.of(add_adapter(model, config.adapter, 0) if config.adapter else model)
    reference = BaseReference("base", None, "", config.policy.quantization, None)
    place = Location(tmp_path, None, reference, None)
    peak = _policy_peak(config, shape, counted, place, None) / 2**30
    assert round(peak) == said
