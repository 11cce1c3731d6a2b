"""InternLM3, which transformers computes as Llama: packed rows under its dynamic scaling, and the way out and back."""

import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.whole_models import full_logits
from tuner.config import LoRA, Model
from tuner.data.batch import make_batch
from tuner.models.load import load_model
from tuner.models.save import save_model
from tuner.models.segment_rope import SegmentedRotary
from tuner.models.tiny import tiny_model_folder

CPU = torch.device("cpu")


def published(folder):
    """A tiny model in the form of the published config.json: biases and scaling under its own names."""
    tiny_model_folder("internlm/internlm3-8b-instruct", folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    assert values["model_type"] == "internlm3"
    for name in ("rope_parameters", "attention_bias", "mlp_bias"):
        values.pop(name, None)
    values |= {"qkv_bias": False, "bias": False, "max_position_embeddings": 24, "rope_theta": 5e7}
    values["rope_scaling"] = {"rope_type": "dynamic", "factor": 6.0}
    values["architectures"] = ["InternLM3ForCausalLM"]
    file.write_text(json.dumps(values))
    return folder


@torch.no_grad()
def test_packed_rows_and_round_trip(tmp_path):
    folder = published(tmp_path / "published")
    loaded = load_model(Model(path=str(folder)), precision="fp32", device=CPU)
    assert loaded.transformer.config.rope_parameters["rope_theta"] == 5e7
    assert isinstance(loaded.transformer.model.rotary_emb, SegmentedRotary)
    save_model(loaded, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] == "internlm3"
    assert saved["rope_parameters"] == {"rope_theta": 5e7, "rope_type": "dynamic", "factor": 6.0}
    rows = [torch.arange(5, 5 + length) for length in (40, 9, 24)]
    batch = make_batch([(row.numpy().astype("int32"), torch.zeros(len(row)).numpy()) for row in rows])
    packed = full_logits(loaded.model, batch).split([len(row) for row in rows])
    for path in (folder, tmp_path / "saved"):
        for row, logits in zip(rows, packed, strict=True):
            theirs = AutoModelForCausalLM.from_pretrained(path)  # anew: its scaling remembers the longest row
            torch.testing.assert_close(theirs(row[None]).logits[0], logits, atol=2e-6, rtol=0)


def test_an_adapter_reaches_its_layers(tmp_path):
    folder = published(tmp_path / "published")
    loaded = load_model(Model(path=str(folder)), precision="fp32", device=CPU, adapter=LoRA(r=2))
    targets = {
        name.split(".")[-4] for name, weight in loaded.model.named_parameters() if weight.requires_grad
    }
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert targets == expected
    assert AutoConfig.from_pretrained(folder).model_type == "internlm3"
