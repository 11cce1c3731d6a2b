"""A merged model is the trained one, or it is not written."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tuner.config import LoRA, Model, Rope
from tuner.errors import UserError
from tuner.models import merge as module
from tuner.models.load import load_model
from tuner.models.merge import fold, merge
from tuner.models.save import save_model

CPU = torch.device("cpu")
TEXTS = ["The import statement binds a name in the local scope. 请给我介绍五个上海的景点。\n" * 4] * 4


def run_of(folder, run, *, precision="fp32", adapter=None, std=0.02, **model):
    loaded = load_model(
        Model(path=str(folder), **model), precision=precision, device=CPU, adapter=adapter or LoRA(r=4)
    )
    generator = torch.Generator().manual_seed(2)
    for weight in loaded.model.parameters():
        if weight.requires_grad:
            weight.data += std * torch.randn(weight.shape, generator=generator)
    save_model(loaded, run / "model")
    return run, loaded


def logits(model, tokens):
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_merged_model_is_the_trained_one(internlm2_folder, tmp_path, tokens, quantization, precision):
    run, _ = run_of(internlm2_folder, tmp_path / "run", precision=precision, quantization=quantization)
    report = merge(run, tmp_path / "merged", dtype="fp32", texts=TEXTS)
    assert report.tokens >= 256
    assert report.folding.mean_kl < 1e-9
    assert report.folding.agreement == 1
    if precision == "fp32":
        trained = load_model(Model(path=str(run)), precision="fp32", device=CPU, train=False)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(
            logits(merged, tokens), logits(trained.transformer, tokens), atol=1e-5, rtol=0
        )


def test_eight_bit_bases_merge_too(internlm2_folder, tmp_path):
    run, _ = run_of(internlm2_folder, tmp_path / "run", quantization="int8")
    report = merge(run, tmp_path / "merged", dtype="fp32", texts=TEXTS)
    assert report.folding.mean_kl < 1e-9 < report.activations.mean_kl < 1e-3


def test_the_adapter_is_folded_in_not_dropped(internlm2_folder, tmp_path, tokens):
    run, _ = run_of(internlm2_folder, tmp_path / "run", quantization="nf4")
    merge(run, tmp_path / "merged", dtype="fp32", texts=TEXTS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(internlm2_folder)
    assert (logits(merged, tokens) - logits(base, tokens)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("difference", "exceeded"),
    [
        (module.Difference(1e-9, 1.0), ""),
        (module.Difference(2e-3, 1.0), "the mean KL is above 0.001"),
        (module.Difference(1e-4, 0.98), "the most likely token is the same on less than 99%"),
        (module.Difference(float("nan"), 0.5), "above 0.001 and the most likely token"),
        (module.ScoreDifference(2e-3, 1.0), "above 0.001"),
        (module.ScoreDifference(1e-4, 1.0), ""),
    ],
)
def test_the_limit_that_binds_is_named(difference, exceeded):
    assert exceeded in difference.exceeded
    assert bool(difference.exceeded) == bool(exceeded)
    if exceeded:
        with pytest.raises(UserError, match=exceeded):
            module._check(difference, "run")


def test_rounding_is_reported_apart(internlm2_folder, tmp_path):
    run, _ = run_of(internlm2_folder, tmp_path / "run", quantization="nf4")
    report = merge(run, tmp_path / "merged", texts=TEXTS)
    assert report.folding.mean_kl < 1e-9 < report.rounding.mean_kl < 1e-4
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_the_merged_folder_is_complete_and_in_internlm2s_layout(internlm2_folder, tmp_path):
    rope = Rope(scaling="dynamic", factor=2.0)
    run, trained = run_of(internlm2_folder, tmp_path / "run", quantization="nf4", rope=rope)
    merge(run, tmp_path / "merged", texts=TEXTS)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert weights.keys() == load_file(internlm2_folder / "model.safetensors").keys()
    assert "model.layers.0.attention.wqkv.weight" in weights
    loaded = load_model(Model(path=str(tmp_path / "merged")), precision="fp32", device=CPU)
    assert loaded.transformer.config.rope_parameters["rope_type"] == "dynamic"
    assert loaded.tokenizer("hello") == trained.tokenizer("hello")


@pytest.mark.parametrize(
    "lora",
    [
        LoRA(r=4),
        LoRA(r=4, train_whole=("embed_tokens",)),
        LoRA(r=4, train_whole=("lm_head",)),
        LoRA(r=4, train_whole=("embed_tokens", "lm_head")),
        LoRA(r=4, targets=("q_proj", "lm_head")),
    ],
)
@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
def test_a_tied_head_is_not_lost(tied_folder, tmp_path, tokens, lora, quantization):
    run, trained = run_of(tied_folder, tmp_path / "run", adapter=lora, quantization=quantization)
    merge(run, tmp_path / "merged", dtype="fp32", texts=TEXTS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings == (lora == LoRA(r=4))
    torch.testing.assert_close(logits(merged, tokens), logits(trained.transformer, tokens), atol=1e-5, rtol=0)


def test_a_corrupted_merge_is_refused_and_not_written(internlm2_folder, tmp_path, monkeypatch):
    run, _ = run_of(internlm2_folder, tmp_path / "run", quantization="nf4")

    def corrupted(*arguments):
        model = fold(*arguments)
        model.model.layers[1].self_attn.v_proj.weight *= -1
        return model

    monkeypatch.setattr(module, "fold", corrupted)
    with pytest.raises(UserError, match=r"merging changes the model.*nothing was written"):
        merge(run, tmp_path / "merged", texts=TEXTS)
    assert not (tmp_path / "merged").exists()


def test_nan_is_refused(internlm2_folder, tmp_path, monkeypatch):
    run, _ = run_of(internlm2_folder, tmp_path / "run")

    def broken(*arguments):
        model = fold(*arguments)
        model.lm_head.weight[:] = float("nan")
        return model

    monkeypatch.setattr(module, "fold", broken)
    with pytest.raises(UserError, match="merging changes the model"):
        merge(run, tmp_path / "merged", texts=TEXTS)


def test_a_merge_into_four_bits_would_have_been_refused(internlm2_folder, tmp_path, monkeypatch):
    """What others do by mistake, measured by our own yardstick."""
    run, _ = run_of(internlm2_folder, tmp_path / "run", quantization="nf4", std=0.05)
    monkeypatch.setattr(module, "dequantize", lambda model: None)
    with (
        pytest.raises(UserError, match="merging changes the model"),
        pytest.warns(UserWarning, match="4-bit"),
    ):
        merge(run, tmp_path / "merged", texts=TEXTS)


def test_too_little_text(internlm2_folder, tmp_path):
    run, _ = run_of(internlm2_folder, tmp_path / "run")
    with pytest.raises(UserError, match="give 256 or more"):
        merge(run, tmp_path / "merged", texts=["hello"])


def test_no_adapter(internlm2_folder, tmp_path):
    with pytest.raises(UserError, match="no adapter to merge"):
        merge(internlm2_folder, tmp_path / "merged", texts=TEXTS)


def test_an_output_folder_with_something_in_it(internlm2_folder, tmp_path):
    run, _ = run_of(internlm2_folder, tmp_path / "run")
    with pytest.raises(UserError, match="is not empty"):
        merge(run, run, texts=TEXTS)


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_has_its_name_when_it_is_whole(internlm2_folder, tmp_path, monkeypatch, exists):
    run, _ = run_of(internlm2_folder, tmp_path / "run")
    output = tmp_path / "merged"
    if exists:  # as a mounted disk, whose name no other folder can take
        output.mkdir()
    whole_before = []
    write = module.write_companions

    def last_part(loaded, folder):
        whole_before.append(output.exists())
        write(loaded, folder)

    monkeypatch.setattr(module, "write_companions", last_part)
    merge(run, output, dtype="fp32", texts=TEXTS)
    assert whole_before == [exists]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "merged"}
    assert (output / "config.json").is_file()
