"""A saved reward model is complete: its head, and the inputs it was trained on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuner.config import LoRA, Model
from tuner.errors import UserError
from tuner.models.load import load_model
from tuner.models.locate import locate
from tuner.models.reward_record import (
    Reference,
    RewardRecord,
    read_reward_record,
    set_score_token,
    write_reward_record,
)
from tuner.models.save import save_model
from tuner.models.tiny import tiny_model_folder

CPU = torch.device("cpu")
KINDS = {
    "lora": {"adapter": LoRA(r=4)},
    "qlora": {"adapter": LoRA(r=4), "quantization": "nf4"},
    "full": {},
}


def load(path, *, precision="fp32", adapter=None, train=True, head="score", **model):
    return load_model(
        Model(path=str(path), **model),
        precision=precision,
        device=CPU,
        adapter=adapter,
        train=train,
        head=head,
    )


def trained(loaded, std=0.05):
    """The same model after some training, as it were."""
    generator = torch.Generator().manual_seed(3)
    for weight in loaded.model.parameters():
        if weight.requires_grad:
            weight.data += std * torch.randn(weight.shape, generator=generator)
    return loaded


@torch.no_grad()
def score(loaded, tokens):
    loaded.transformer.set_attn_implementation("sdpa")
    return loaded.model(input_ids=tokens, use_cache=False).logits[0, 0]


@pytest.fixture(params=KINDS)
def saved(request, internlm2_folder, tmp_path):
    """(kind, folder, model) of a reward model as training leaves it."""
    loaded = trained(load(internlm2_folder, **KINDS[request.param]))
    save_model(loaded, tmp_path / "run" / "model")
    return request.param, tmp_path / "run" / "model", loaded


@pytest.mark.parametrize("train", [True, False])
def test_the_head_is_saved_and_loaded(saved, tokens, train):
    kind, folder, loaded = saved
    again = load(folder, train=train)
    assert torch.equal(score(again, tokens), score(loaded, tokens))
    assert again.transformer.score.weight.dtype == torch.float32
    assert again.transformer.score.weight.abs().max() > 0
    file = folder / ("model.safetensors" if kind == "full" else "adapter_model.safetensors")
    heads = [name for name in load_file(file) if "head" in name or "score" in name]
    assert heads == (["v_head.weight"] if kind == "full" else ["base_model.model.score.weight"])
    head = next(
        weight for name, weight in again.model.named_parameters() if "score" in name and "orig" not in name
    )
    assert head.requires_grad == train


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_computed_in_fp32_whatever_the_rest(internlm2_folder, tmp_path, kind):
    loaded = trained(load(internlm2_folder, precision="bf16", **KINDS[kind]))
    save_model(loaded, tmp_path / "model")
    again = load(tmp_path / "model", precision="bf16", train=False)
    assert again.transformer.score.weight.dtype == torch.float32
    if kind != "full":  # all weights of a full model are written in the asked precision
        saved = load_file(tmp_path / "model" / "adapter_model.safetensors")["base_model.model.score.weight"]
        assert torch.equal(saved, dict(loaded.model.named_parameters())[HEAD])
        assert not torch.equal(saved, saved.bfloat16().float())


HEAD = "base_model.model.score.modules_to_save.default.weight"


def test_the_record_comes_back(internlm2_folder, tmp_path):
    record = RewardRecord(
        reward_token="<|plugin|>",
        conditions={"brief": ("Be brief.", "请简短。"), "plain": ("No\nJSON.",)},
        seed=3,
        max_length=128,
        bound=5.0,
        reference=Reference(0.25, 1.5, 40),
        verdict=("It fails.",),
    )
    write_reward_record(tmp_path, record)
    assert read_reward_record(load(internlm2_folder), tmp_path) == record
    assert record.reference.standardized(1.75) == 1.0
    assert Reference(0.25, 0.0, 1).standardized(1.75) == 0.0
    bare = RewardRecord(reward_token=None)
    write_reward_record(tmp_path, bare)
    assert read_reward_record(load(internlm2_folder), tmp_path) == bare


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"cannot be read \(Invalid JSON"),
        ("[]", "input should be an object"),
        ('{"seed": 1}', "reward_token: is required"),
        ('{"reward_token": "x", "colour": 1}', "colour: unexpected"),
        ('{"reward_token": "x", "bound": NaN}', "bound: input should be a finite number"),
        (
            '{"reward_token": "x", "conditions": {"brief": "x"}}',
            r"conditions.brief: write a list, as in \['x'\]",
        ),
        ("\xff", r"cannot be read \(Invalid JSON"),
    ],
)
def test_a_damaged_record(internlm2_folder, tmp_path, text, words):
    (tmp_path / "reward.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"reward\.json: {words}"):
        read_reward_record(load(internlm2_folder), tmp_path)


def test_a_record_that_is_lost(saved):
    """Without it nobody knows at which token the score is to be read."""
    _, folder, loaded = saved
    with pytest.raises(UserError, match=r"reward\.json.* is missing"):
        read_reward_record(loaded, folder)


def test_a_reward_model_made_elsewhere_is_asked_as_its_config_says(internlm2_folder, tmp_path):
    loaded = trained(load(internlm2_folder))
    loaded.transformer.config.reward_token_id = 5
    save_model(loaded, tmp_path)
    (tmp_path / "tuner.json").unlink()
    token = loaded.tokenizer.convert_ids_to_tokens(5)
    assert read_reward_record(load(tmp_path), tmp_path) == RewardRecord(reward_token=token)


# What is refused


@pytest.mark.parametrize("damage", ["gone", "shape", "file"])
def test_a_damaged_head_is_refused(saved, damage):
    """Never re-drawn, nor zero: a reward model without its head scores everything alike, and says nothing of it."""
    kind, folder, _ = saved
    file = folder / ("model.safetensors" if kind == "full" else "adapter_model.safetensors")
    weights = load_file(file)
    name = "v_head.weight" if kind == "full" else "base_model.model.score.weight"
    if damage == "gone":
        weights.pop(name)
    elif damage == "shape":
        weights[name] = torch.zeros(2, weights[name].shape[1])
    save_file(weights, file, metadata={"format": "pt"})
    if damage == "file":
        file.write_bytes(file.read_bytes()[:-40])
    for train in (True, False):
        with pytest.raises(UserError, match="restore") as caught:
            load(folder, train=train)
        assert damage != "gone" or "1 missing weights" in str(caught.value)


def test_a_head_beside_an_adapter_of_a_full_reward_model(internlm2_folder, tmp_path, tokens):
    """An adapter on it begins with its head, which the base must have."""
    base = trained(load(internlm2_folder))
    save_model(base, tmp_path / "base")
    adapted = load(tmp_path / "base", adapter=LoRA(r=4))
    assert torch.equal(score(adapted, tokens), score(base, tokens))
    save_model(trained(adapted), tmp_path / "adapted")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["v_head.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing weights, such as score\.weight"):
        load(tmp_path / "base", adapter=LoRA(r=4))
    with pytest.raises(UserError, match="trained on another"):
        load(tmp_path / "adapted")


def test_what_is_a_reward_model_is_told_by_its_folder(saved, internlm2_folder, tmp_path):
    _, folder, _ = saved
    assert locate(Model(path=str(folder))).has_score
    assert locate(Model(path=str(folder.parent)), weights=False).has_score
    with pytest.raises(UserError, match="this is a reward model, and a language model is needed"):
        load(folder, head="language")
    assert not locate(Model(path=str(internlm2_folder))).has_score
    save_model(load(internlm2_folder, adapter=LoRA(r=4), head="language"), tmp_path / "language")
    assert not locate(Model(path=str(tmp_path / "language"))).has_score


def test_a_classifier_is_no_reward_model(tmp_path):
    """One score for each of several classes: its head does not fit."""
    from transformers import AutoModelForSequenceClassification

    folder = tiny_model_folder("org/llama", tmp_path / "llama")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(
        tmp_path / "three"
    )
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "three")
    with pytest.raises(UserError, match=r"1 mismatched weights, such as score\.weight"):
        load(tmp_path / "three")


@pytest.mark.parametrize(
    "lora", [LoRA(r=4, train_whole=("lm_head",)), LoRA(r=4, targets=("q_proj", "lm_head"))]
)
def test_an_adapter_with_a_language_head_of_its_own(internlm2_folder, tmp_path, lora):
    save_model(load(internlm2_folder, adapter=lora, head="language"), tmp_path / "model")
    with pytest.raises(UserError, match="a language head of its own"):
        load(tmp_path / "model")


# What other tools are told


@pytest.mark.parametrize("family", ["internlm2", "llama", "qwen3", "mistral", "gemma", "smollm"])
@pytest.mark.parametrize("ends_with", ["pad", "end", "other", None])
def test_padding_is_never_the_token_that_is_scored(family, ends_with, tmp_path):
    """transformers and vLLM read the score at the last token that is no padding."""
    loaded = trained(load(tiny_model_folder(f"org/{family}", tmp_path / "base")))
    tokenizer = loaded.tokenizer
    token = {
        "pad": tokenizer.pad_token,
        "end": tokenizer.eos_token,
        "other": tokenizer.convert_ids_to_tokens(100),
        None: None,
    }[ends_with]
    before = tokenizer.pad_token_id
    set_score_token(loaded, token)
    save_model(loaded, tmp_path / "saved")
    read = load(tmp_path / "saved", train=False)
    last = tokenizer.eos_token_id if token is None else tokenizer.convert_tokens_to_ids(token)
    assert read.tokenizer.pad_token_id == read.transformer.config.pad_token_id != last
    if before != last:
        assert read.tokenizer.pad_token_id == before
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values.get("reward_token_id") == (None if token is None else last)
    assert values["problem_type"] == "regression"  # vLLM's word for a score that goes through no sigmoid
    row = torch.tensor([[*range(30, 40), last]])
    padded = torch.cat([row, torch.full((1, 3), read.tokenizer.pad_token_id)], dim=1)
    read.transformer.set_attn_implementation("sdpa")
    with torch.no_grad():
        alone = read.model(input_ids=row, use_cache=False).logits
        beside = read.model(
            input_ids=padded,
            attention_mask=(torch.arange(14) < 11)[None].long(),
            use_cache=False,
        ).logits
    torch.testing.assert_close(alone, beside, atol=1e-6, rtol=0)


def test_the_token_of_an_earlier_run_is_told_no_more(internlm2_folder):
    loaded = load(internlm2_folder)
    for token in ("<|plugin|>", None):
        set_score_token(loaded, token)
    assert loaded.transformer.config.reward_token_id is None
