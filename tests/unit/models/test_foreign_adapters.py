"""Adapters that other tools saved: trained further, saved as they were, merged, or refused in a sentence."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tuner.config import Model
from tuner.data.batch import make_batch
from tuner.errors import UserError
from tuner.models.adapters import ADAPTER, copy_adapter
from tuner.models.forward import token_loss
from tuner.models.load import load_model
from tuner.models.merge import merge
from tuner.models.save import save_model
from tuner.models.tiny import tiny_model_folder

CPU = torch.device("cpu")
TEXTS = ["The import statement binds a name in the local scope. 请给我介绍五个上海的景点。\n" * 4] * 4
REGEX = {"target_modules": r".*self_attn\.(q_proj|v_proj)"}
NAMES = {"target_modules": ["q_proj", "down_proj"]}
KNOWN = {
    "a pattern": REGEX,
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "layers": NAMES | {"layers_to_transform": [1], "layers_pattern": "layers"},
    "ranks": NAMES | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}, "use_rslora": True},
    "dora": NAMES | {"use_dora": True},
    "biases": NAMES | {"lora_bias": True},
    "tokens": NAMES | {"trainable_token_indices": {"embed_tokens": [5, 6]}},
    "whole": NAMES | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["k_proj.weight"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model_folder("org/llama", tmp_path_factory.mktemp("foreign") / "base")


def saved(base, folder, **settings):
    """A folder that peft alone wrote, its adapter not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.02 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def by_peft(base, folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder).eval()(input_ids=tokens, use_cache=False).logits


def learn(loaded):
    """One step of plain gradient descent on some tokens; every trained weight must have a gradient."""
    rows = np.array([1, 5, 6, 7, 300, 5, 6, 40, 41, 42], dtype=np.int32)
    token_loss(loaded.model, make_batch([(rows, np.ones(len(rows), np.float32))])).backward()
    for name, weight in loaded.model.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
            assert weight.grad.abs().max() > 0, name
            weight.data -= 0.1 * weight.grad


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.filterwarnings("ignore")
def test_a_foreign_adapter_is_trained_and_saved_as_it_was(base, tmp_path, tokens, kind):
    foreign = saved(base, tmp_path / "foreign", **KNOWN[kind])
    loaded = load_model(Model(path=str(foreign)), precision="fp32", device=CPU)
    before = by_peft(base, foreign, tokens)
    loaded.transformer.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(input_ids=tokens).logits, before, atol=1e-5, rtol=0)
    loaded.transformer.set_attn_implementation("varlen")
    learn(loaded)
    save_model(loaded, tmp_path / "run" / "model")
    first, second = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (foreign, tmp_path / "run/model")
    )
    for values in (first, second):
        for name, value in values.items():  # peft keeps names in sets
            values[name] = sorted(value) if isinstance(value, list) else value
    assert second == first
    after = by_peft(base, tmp_path / "run" / "model", tokens)
    assert (after - before).abs().max() > 1e-5
    if kind == "biases":
        with pytest.raises(UserError, match="its adapter cannot be merged"):
            merge(tmp_path / "run", tmp_path / "merged", dtype="fp32", texts=TEXTS)
        return
    report = merge(tmp_path / "run", tmp_path / "merged", dtype="fp32", texts=TEXTS)
    assert report.folding.agreement == 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=tokens).logits, after, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"of_a_later_peft": 3}, "of_a_later_peft"),
        ({"init_lora_weights": "pissa"}, "has changed the base's weights"),
        ({"lora_alpha": float("nan")}, r"lora_alpha: input should be a finite number"),
        ({"lora_alpha": "8"}, "lora_alpha: input should be a valid number"),
        ({"r": 0}, "r: input should be greater"),
        ({"target_modules": [1]}, r"target_modules.0: input should be a valid string"),
        ({"target_modules": "("}, "does not fit the base model"),
        ({"peft_type": "LOHA"}, "a LOHA adapter; only LoRA"),
        ({"peft_type": "NONE"}, "a NONE adapter; only LoRA"),
        ({"peft_type": 3}, "peft_type: input should be a valid string"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_what_is_not_known_is_refused_before_weights_are_read(base, tmp_path, values, words):
    folder = saved(base, tmp_path / "foreign", **NAMES)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    for device in (CPU, torch.device("meta")):
        with pytest.raises(UserError, match=words):
            load_model(Model(path=str(folder)), precision="fp32", device=device)


def test_fields_of_a_later_peft_that_say_nothing_are_kept_out_of_the_way(base, tmp_path):
    folder = saved(base, tmp_path / "foreign", **NAMES)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_a_later_peft": None, "other": False}))
    load_model(Model(path=str(folder)), precision="fp32", device=CPU)


@pytest.mark.parametrize("settings", [{"bias": "lora_only"}, {"trainable_token_indices": [5]}])
@pytest.mark.filterwarnings("ignore")
def test_what_one_adapter_changes_in_the_base_is_not_shared(base, tmp_path, settings):
    folder = saved(base, tmp_path / "foreign", **NAMES, **settings)
    loaded = load_model(Model(path=str(folder)), precision="fp32", device=CPU)
    with pytest.raises(UserError, match=r'write roles="separate"'):
        copy_adapter(loaded.model, ADAPTER, "reference")
