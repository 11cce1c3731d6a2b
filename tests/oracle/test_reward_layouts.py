"""Reward models outside of tuner: adapters in plain peft, complete models in both layouts, InternLM2's own.

InternLM2's published code (modeling_internlm2.py of the reward models) renders the conversation by the tokenizer's
template, appends `reward_token_id`, and reads v_head at the last token that is attended to.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

import tests.oracle.test_internlm2 as original
import tuner
from tests.equivalence.test_reward import REWARD
from tuner.config import FocalRanking, LoRA, Model, override
from tuner.errors import UserError
from tuner.models.load import load_model
from tuner.models.merge import MAX_SCORE_DIFFERENCE, export, merge
from tuner.models.reward_record import RewardRecord, set_score_token, write_reward_record
from tuner.models.save import save_model
from tuner.models.scorer import open_scorer, score_sequences
from tuner.models.tiny import tiny_model_folder
from tuner.stages.data_view import load_rows

CPU = torch.device("cpu")
KINDS = {
    "lora": {},
    "qlora": {"model.quantization": "nf4"},
    "full": {"adapter": None, "optimizer.lr": 5e-3},
}
TEXTS = ["How much is 12 + 7? It is 19. A broom is a tool for sweeping. " * 30]
CHAT = [{"role": "user", "content": "What is a broom?"}, {"role": "assistant", "content": "A tool. 扫帚"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each kind, of a few steps, so that no score is zero."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        kind: tuner.train(override(REWARD, {"name": kind, **changes}), runs=folder)
        for kind, changes in KINDS.items()
    }


@pytest.fixture(scope="module")
def sequences():
    """Token sequences of several lengths, ended by the reward token."""
    rows = load_rows(override(REWARD, {"data.limit": 4})).train.sequences
    return [np.array(rows.example(index)[0]) for index in range(len(rows))]


@pytest.fixture(scope="module")
def expected(runs, sequences):
    """Scores of each run, by tuner."""
    found = {}
    for kind, run in runs.items():
        loaded = load_model(
            Model(path=str(run.folder)), precision="fp32", device=CPU, train=False, head="score"
        )
        found[kind] = score_sequences(loaded.model, sequences, 512, CPU)
        assert found[kind].std() > 0.01
    return found


@torch.no_grad()
def alone(model, sequences):
    """transformers' sequence classification of each sequence, unpadded."""
    rows = [torch.from_numpy(tokens)[None].long() for tokens in sequences]
    return np.array([model(input_ids=row, use_cache=False).logits.item() for row in rows])


def assert_equal(found, scores):
    np.testing.assert_allclose(found, scores, atol=1e-5, rtol=0)


# Adapters, in peft


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_the_run_is_an_adapter_for_plain_peft(runs, sequences, expected, kind):
    """On the base as a sequence classification model with one score, whose own head is drawn at random."""
    from peft import PeftModel

    options = {}
    if kind == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["score"],
        )
    base = AutoModelForSequenceClassification.from_pretrained(
        REWARD.model.path, num_labels=1, dtype=torch.float32, **options
    )
    model = PeftModel.from_pretrained(base, runs[kind].model_folder).train()  # bitsandbytes repacks in eval
    assert_equal(alone(model, sequences), expected[kind])
    with model.disable_adapter():
        assert np.abs(alone(model, sequences) - expected[kind]).max() > 0.01


PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
found = {}
for name, (base, adapter, rows) in json.load(open(sys.argv[1])).items():
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(adapter or base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
        model.config.pad_token_id = tokenizer.pad_token_id  # an adapter has a tokenizer, and no config.json
    model.eval()
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
        padded = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()
    found[name] = alone, padded, type(model).__name__
assert "tuner" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outside(runs, sequences, tmp_path_factory):
    """By case: (folder, scores by tuner, scores one by one, of a padded batch, class), the last three from one
    process that knows transformers and peft alone."""
    folder, cases, ours = tmp_path_factory.mktemp("outside"), {}, {}
    for kind, run in runs.items():
        complete(run, kind, folder / kind, dtype="fp32", layout="llama")
        cases[kind] = folder / kind, "", sequences
    base = tiny_model_folder("org/llama", folder / "base")
    for kind, lora in {"other-adapter": LoRA(r=4), "other-full": None}.items():
        loaded = load_model(Model(path=str(base)), precision="fp32", device=CPU, adapter=lora, head="score")
        generator = torch.Generator().manual_seed(0)
        for weight in loaded.model.parameters():
            if weight.requires_grad:
                weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
        end = loaded.tokenizer.eos_token_id
        set_score_token(loaded, loaded.tokenizer.eos_token)
        save_model(loaded, folder / kind)
        rows = [np.append(tokens[:-1] % 1000 + 20, end).astype(np.int32) for tokens in sequences]
        ours[kind] = score_sequences(loaded.model, rows, 300, CPU)
        cases[kind] = (base, folder / kind, rows) if lora else (folder / kind, "", rows)
    asked = {
        name: (str(place), str(adapter), [row.tolist() for row in rows])
        for name, (place, adapter, rows) in cases.items()
    }
    (folder / "cases.json").write_text(json.dumps(asked))
    command = [sys.executable, "-c", PLAIN, str(folder / "cases.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: (folder / name, ours.get(name), *found[name]) for name in cases}


@pytest.mark.parametrize("kind", ["other-adapter", "other-full"])
def test_another_family_without_tuner(outside, kind):
    """Llama's own classes: where the token that ends texts is the one that is scored, padding is another."""
    _, scores, one, padded, name = outside[kind]
    assert scores.std() > 0.01
    assert_equal(one, scores)
    assert_equal(padded, scores)
    expected = {
        "other-adapter": "PeftModelForSequenceClassification",
        "other-full": "LlamaForSequenceClassification",
    }
    assert name == expected[kind]


# Complete models


def complete(run, kind, output, **options):
    """A run as one folder, by what `tuner export` calls."""
    if kind == "full":
        return export(run.folder, output, **options)
    report = merge(run.folder, output, texts=TEXTS, **options)
    assert report.folding.largest <= MAX_SCORE_DIFFERENCE
    assert report.folding.standard_deviation > 0.01
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_internlm2s_own_layout(runs, sequences, expected, kind, tmp_path, monkeypatch):
    """v_head and wqkv, the reward code's auto_map; read by a forward pass written from the published names alone."""
    complete(runs[kind], kind, tmp_path / "own", dtype="fp32")
    weights = load_file(tmp_path / "own" / "model.safetensors")
    values = json.loads((tmp_path / "own" / "config.json").read_text())
    assert weights["v_head.weight"].shape == (1, values["hidden_size"])
    assert "model.layers.0.attention.wqkv.weight" in weights
    assert not [name for name in weights if "score" in name or name.startswith(("output", "lm_head"))]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert values["architectures"] == ["InternLM2ForRewardModel"]
    assert values["model_type"] == "internlm2"
    assert values["reward_token_id"] == tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_130]")
    assert values["auto_map"] == {
        "AutoConfig": "internlm/internlm2-7b-reward--configuration_internlm2.InternLM2Config",
        "AutoModel": "internlm/internlm2-7b-reward--modeling_internlm2.InternLM2ForRewardModel",
    }
    assert (values["rope_theta"], values["rope_scaling"], values["bias"]) == (1e6, None, False)
    assert_equal(by_the_original_names(weights, values, sequences, monkeypatch), expected[kind])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "own")
    assert_equal(alone(model, sequences), expected[kind])
    scorer = open_scorer(str(tmp_path / "own"))
    assert_equal(score_sequences(scorer.loaded.model, sequences, 300, CPU), expected[kind])
    assert scorer.record == open_scorer(str(runs[kind].folder)).record


def by_the_original_names(weights, values, sequences, monkeypatch):
    """Scores at the last token, fp64, of a checkpoint in InternLM2's names and shapes."""
    shape = {
        "HEADS": values["num_attention_heads"],
        "KV_HEADS": values["num_key_value_heads"],
        "HIDDEN": values["hidden_size"],
        "LAYERS": values["num_hidden_layers"],
        "HEAD_DIM": values["hidden_size"] // values["num_attention_heads"],
        "MAX_POSITION": values["max_position_embeddings"],
        "EPS": values["rms_norm_eps"],
        "THETA": values["rope_theta"],
    }
    for name, value in shape.items():
        monkeypatch.setattr(original, name, value)
    factor = (values["rope_scaling"] or {}).get("factor")
    rows = [torch.from_numpy(np.asarray(tokens)).long() for tokens in sequences]
    heads = weights | {"output.weight": weights["v_head.weight"]}
    return np.array([original.reference_logits(heads, row, factor)[-1, 0].item() for row in rows])


@pytest.mark.parametrize("kind", KINDS)
def test_llamas_layout_without_tuner(outside, sequences, expected, kind):
    """LlamaForSequenceClassification for tools that do not know InternLM2, padded batches too."""
    folder, _, one, padded, name = outside[kind]
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"] == ["LlamaForSequenceClassification"] == [name]
    assert (values["model_type"], values["problem_type"]) == ("llama", "regression")
    assert "auto_map" not in values
    reward = values["reward_token_id"]
    assert values["pad_token_id"] == AutoTokenizer.from_pretrained(folder).pad_token_id != reward
    assert all(tokens[-1] == reward for tokens in sequences)
    assert_equal(one, expected[kind])
    assert_equal(padded, expected[kind])
    scorer = open_scorer(str(folder))
    assert_equal(score_sequences(scorer.loaded.model, sequences, 300, CPU), expected[kind])


def test_a_complete_model_goes_through_layouts_and_precisions(runs, sequences, expected, tmp_path):
    """Own to own and to Llama again, from a folder that is no run; in bf16 the scores are near."""
    complete(runs["lora"], "lora", tmp_path / "own", dtype="fp32")
    export(tmp_path / "own", tmp_path / "llama", dtype="fp32", layout="llama")
    export(tmp_path / "llama", tmp_path / "again", dtype="bf16")
    for name in ("llama", "again"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name, dtype=torch.float32)
        found = alone(model, sequences)
        near = 1e-5 if name == "llama" else 0.05
        np.testing.assert_allclose(found, expected["lora"], atol=near, rtol=0)
    with pytest.raises(UserError, match="--layout llama is for InternLM2, and this is Llama"):
        export(tmp_path / "llama", tmp_path / "no", layout="llama")
    with pytest.raises(UserError, match="has an adapter, which must be merged"):
        export(runs["lora"].folder, tmp_path / "no")


def test_a_merge_that_loses_the_head_is_refused(runs, tmp_path, monkeypatch):
    from tuner.models import merge as module

    fold = module.fold

    def forgetful(*arguments):
        model = fold(*arguments)
        model.score.weight.data *= 0.5
        return model

    monkeypatch.setattr(module, "fold", forgetful)
    with pytest.raises(UserError, match=r"merging changes the model.*scores differ.*nothing was written"):
        merge(runs["lora"].folder, tmp_path / "merged", texts=TEXTS)
    assert not (tmp_path / "merged").exists()


def test_a_score_read_at_the_conversations_own_end(tmp_path):
    """Without a reward token there is none to tell InternLM2's code, which would append its own default."""
    loaded = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU, head="score")
    set_score_token(loaded, None)
    save_model(loaded, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["reward_token_id"] is None
    assert values["auto_map"]["AutoModel"].endswith("InternLM2ForRewardModel")


# InternLM2's published reward models


@pytest.fixture
def released(tmp_path, monkeypatch):
    """(folder, weights) of a random checkpoint as they are published: other weights than tuner ever wrote."""
    tokenizer = AutoTokenizer.from_pretrained(
        tiny_model_folder("internlm/internlm2-7b", tmp_path / "tokenizer")
    )
    monkeypatch.setattr(original, "VOCABULARY", len(tokenizer))
    monkeypatch.setattr(original, "MAX_POSITION", 64)
    folder = tmp_path / "released"
    folder.mkdir()
    weights = original.checkpoint(bias=False)
    del weights["output.weight"]
    weights["v_head.weight"] = (
        torch.randn(1, original.HIDDEN, generator=torch.Generator().manual_seed(5)) * 0.3
    )
    values = original.original_config(bias=False, rope_scaling={"type": "dynamic", "factor": 2.0})
    reward = tokenizer.convert_tokens_to_ids("<|plugin|>")
    values |= {
        "architectures": ["InternLM2ForRewardModel"],
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
        },
        "reward_token_id": reward,
    }
    (folder / "config.json").write_text(json.dumps(values))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in (tmp_path / "tokenizer").glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(tmp_path / "tokenizer" / "chat_template.jinja", folder)
    return folder, weights, values, tokenizer


@pytest.mark.parametrize("length", [1, 30])
def test_a_released_checkpoint_is_scored_as_its_own_code_does(released, length):
    """Rendered, ended and read as get_score() of the published code: also past the trained length."""
    folder, weights, values, tokenizer = released
    chat = [CHAT[0], {**CHAT[1], "content": CHAT[1]["content"] * length}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    assert text.endswith("<|im_end|>\n")
    tokens = [*tokenizer.encode(text, add_special_tokens=False), values["reward_token_id"]]
    assert (len(tokens) > values["max_position_embeddings"]) == (length > 1)
    heads = weights | {"output.weight": weights["v_head.weight"]}
    expected = original.reference_logits(heads, torch.tensor(tokens), 2.0)[-1, 0].item()
    assert abs(expected) > 0.01
    scorer = open_scorer(str(folder))
    assert scorer.record == RewardRecord(reward_token="<|plugin|>")
    assert scorer.score([{"messages": CHAT}, {"messages": chat}])[1] == pytest.approx(expected, abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert alone(model, [np.array(tokens)])[0] == pytest.approx(expected, abs=1e-5)


def test_a_released_checkpoint_is_written_back_bit_for_bit(released, tmp_path):
    folder, weights, values, _ = released
    export(folder, tmp_path / "saved", dtype="fp32")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in weights.items())
    found = json.loads((tmp_path / "saved" / "config.json").read_text())
    changing = {"auto_map", "transformers_version", "pad_token_id"}  # padding is the tokenizer's
    for name in values.keys() - changing:
        assert found[name] == values[name], name


def test_training_goes_on_from_a_released_checkpoint(released, tmp_path, monkeypatch):
    """Its first scores are its own; what is saved is again what its code reads."""
    folder, _, values, _ = released
    config = override(
        REWARD,
        {
            "model.path": str(folder),
            "adapter": None,
            "reward_token": "<|plugin|>",
            "max_steps": 2,
            "data.limit": 12,
            "data.max_length": 512,
            "tokens_per_step": 1024,
            "tokens_per_pass": 1024,
            "loss": FocalRanking(),
        },
    )
    run = tuner.train(config, runs=tmp_path / "runs")
    before = open_scorer(str(folder))
    data = load_rows(config).train
    rows = [np.array(data.sequences.example(index)[0]) for index in range(4)]
    ours = score_sequences(before.loaded.model, rows, 1024, CPU)
    assert run.metrics[0]["score"] != 0
    written = load_file(run.model_folder / "model.safetensors")
    saved = json.loads((run.model_folder / "config.json").read_text())
    assert saved["reward_token_id"] == values["reward_token_id"]
    after = by_the_original_names(written, saved, rows, monkeypatch)
    assert_equal(after, score_sequences(open_scorer(str(run.folder)).loaded.model, rows, 1024, CPU))
    assert np.abs(after - ours).max() > 1e-3


def test_a_record_beside_a_released_checkpoint_goes_first(released):
    folder, *_ = released
    write_reward_record(
        folder, RewardRecord(reward_token="<|interpreter|>", conditions={"brief": ("Short.",)})
    )
    scorer = open_scorer(str(folder))
    assert scorer.record.reward_token == "<|interpreter|>"
    row = {"messages": CHAT}
    assert scorer.score([row])[0] != scorer.score([row], condition="brief")[0]
