"""What is loaded is what the folder says, or an error that says what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuner.config import Freeze, LoRA, Model, Rope
from tuner.errors import UserError
from tuner.models.load import load_model, load_tokenizer
from tuner.models.save import save_model

CPU = torch.device("cpu")


def load(path, *, precision="fp32", adapter=None, freeze=None, train=True, **model):
    return load_model(
        Model(path=str(path), **model),
        precision=precision,
        device=CPU,
        adapter=adapter,
        freeze=freeze,
        seed=1,
        train=train,
    )


def logits(loaded, tokens):
    loaded.transformer.set_attn_implementation("sdpa")
    with torch.no_grad():
        return loaded.model(input_ids=tokens, use_cache=False).logits


def changed(loaded):
    """The same model after some training, as it were."""
    generator = torch.Generator().manual_seed(2)
    for weight in loaded.model.parameters():
        if weight.requires_grad:
            weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return loaded


def run_of(folder, tmp_path, name="run", **options):
    """A finished run's folder, and the model that was saved into it."""
    loaded = changed(load(folder, **options))
    save_model(loaded, tmp_path / name / "model")
    return tmp_path / name, loaded


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def copy(internlm2_folder, tmp_path):
    return shutil.copytree(internlm2_folder, tmp_path / "copy")


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_are_trained_in_fp32_and_the_rest_is_frozen(internlm2_folder, quantization, precision):
    loaded = load(internlm2_folder, precision=precision, adapter=LoRA(r=4), quantization=quantization)
    held_in = torch.float32 if precision == "fp32" else torch.bfloat16
    for name, weight in loaded.model.named_parameters():
        assert weight.requires_grad == ("lora_" in name)
        if weight.requires_grad:
            assert weight.dtype == torch.float32
        elif weight.is_floating_point():
            assert weight.dtype == held_in


def test_full_training_holds_all_weights_in_fp32(internlm2_folder):
    loaded = load(internlm2_folder, precision="bf16")
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    assert all(weight.requires_grad for weight in loaded.model.parameters())


def test_full_training_holds_frozen_weights_in_bf16(internlm2_folder):
    loaded = load(internlm2_folder, precision="bf16", freeze=Freeze(all_but_last_layers=1))
    dtypes = {weight.requires_grad: weight.dtype for weight in loaded.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_using_a_model_holds_it_in_its_precision_and_trains_nothing(internlm2_folder):
    loaded = load(internlm2_folder, precision="bf16", train=False)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


def test_fresh_adapters_change_nothing_and_follow_the_seed(internlm2_folder, tokens):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again = (load(internlm2_folder, adapter=LoRA(r=4)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for weight, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(weight, other)
    assert torch.equal(logits(first, tokens), logits(load(internlm2_folder), tokens))


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_a_run_folder_is_a_model_with_its_adapter_and_quantisation(
    internlm2_folder, tmp_path, tokens, quantization
):
    run, trained = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4), quantization=quantization)
    loaded = load(run)
    assert loaded.base.quantization == quantization
    assert loaded.adapter == LoRA(r=4)
    assert torch.equal(logits(loaded, tokens), logits(trained, tokens))


def test_chains_never_stack(internlm2_folder, tmp_path, tokens):
    first, _ = run_of(internlm2_folder, tmp_path, "first", adapter=LoRA(r=4), quantization="nf4")
    second, trained = run_of(first, tmp_path, "second")
    loaded = load(second)
    assert loaded.base == trained.base
    assert loaded.base.path == str(internlm2_folder)
    assert len(loaded.model.peft_config) == 1
    assert torch.equal(logits(loaded, tokens), logits(trained, tokens))


def test_a_run_of_full_training_is_the_base_of_the_next(internlm2_folder, tmp_path, tokens):
    first, trained = run_of(internlm2_folder, tmp_path, "first")
    adapted = load(first, adapter=LoRA(r=4))
    assert torch.equal(logits(adapted, tokens), logits(trained, tokens))
    save_model(adapted, tmp_path / "second" / "model")
    assert load(tmp_path / "second").base.path == str(first)


@pytest.mark.parametrize(
    ("adapter", "field"),
    [
        (LoRA(r=8), "adapter.r=8"),
        (LoRA(r=4, alpha=32), "adapter.alpha"),
        (LoRA(r=4, targets=("q_proj",)), "adapter.targets"),
        (LoRA(r=4, train_whole=("lm_head",)), "adapter.train_whole"),
    ],
)
def test_a_continued_adapter_keeps_its_shape(internlm2_folder, tmp_path, adapter, field):
    run, _ = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4))
    with pytest.raises(UserError, match=rf"{field}.*merge"):
        load(run, adapter=adapter)


def test_a_continued_adapter_may_have_another_dropout(internlm2_folder, tmp_path):
    run, _ = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4))
    loaded = load(run, adapter=LoRA(r=4, dropout=0.25))
    rates = {module.p for module in loaded.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}


@pytest.mark.parametrize(
    ("model", "field"), [({"quantization": "nf4"}, "quantization"), ({"rope": Rope(base=5e5)}, "rope")]
)
def test_a_run_keeps_what_it_was_trained_with(internlm2_folder, tmp_path, model, field):
    run, _ = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4))
    with pytest.raises(UserError, match=rf"model\.{field}.*leave {field} out"):
        load(run, **model)


def test_an_adapter_refuses_another_base(copy, tmp_path):
    run, _ = run_of(copy, tmp_path, adapter=LoRA(r=4))
    edit_weights(copy, lambda weights: weights["output.weight"][0, 0].add_(1))
    with pytest.raises(UserError, match="trained on another"):
        load(run)


def test_a_quantised_adapter_refuses_another_precision(copy, tmp_path):
    """Its base would be quantised from other roundings: not the one it was trained on."""
    run, _ = run_of(copy, tmp_path, adapter=LoRA(r=4), quantization="nf4", precision="bf16")
    with pytest.raises(UserError, match="trained on a base held in bf16; write precision=bf16"):
        load_model(Model(path=str(run)), precision="fp32", device=CPU)
    load_model(Model(path=str(run)), precision="bf16", device=CPU)


def test_an_adapter_finds_its_base_from_another_working_directory(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, _ = run_of("copy", tmp_path, adapter=LoRA(r=4))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load(run).base.path == "copy"


def test_the_base_of_an_adapter_that_is_gone(copy, tmp_path):
    run, _ = run_of(copy, tmp_path, adapter=LoRA(r=4))
    shutil.rmtree(copy)
    with pytest.raises(UserError, match="base of its adapter is missing"):
        load(run)


@pytest.mark.parametrize(("change", "kind"), [("pop", "missing"), ("add", "unexpected")])
def test_adapter_weights_must_be_whole(internlm2_folder, tmp_path, change, kind):
    run, _ = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4))
    file = run / "model" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    if change == "pop":
        del weights[name]
    else:
        weights[name.replace("layers.0", "layers.9").replace("layers.1", "layers.9")] = weights[name].clone()
    save_file(weights, file)
    with pytest.raises(UserError, match=f"1 {kind} weights"):
        load(run)


def test_missing_weights(copy):
    edit_weights(copy, lambda weights: weights.pop("model.layers.1.feed_forward.w2.weight"))
    with pytest.raises(
        UserError, match=r"1 missing weights, such as model\.layers\.1\.mlp\.down_proj\.weight"
    ):
        load(copy)


def test_unexpected_weights(copy):
    edit_weights(copy, lambda weights: weights.update({"v_head.weight": torch.zeros(1, 64)}))
    with pytest.raises(UserError, match=r"1 unexpected weights, such as v_head\.weight"):
        load(copy)


def test_weights_of_another_shape(copy):
    edit_weights(copy, lambda weights: weights.update({"output.weight": torch.zeros(3, 64)}))
    with pytest.raises(UserError, match=r"lm_head\.weight|cannot be loaded"):
        load(copy)


def test_a_wqkv_of_another_shape(copy):
    name = "model.layers.0.attention.wqkv.weight"
    edit_weights(copy, lambda weights: weights.update({name: torch.zeros(60, 64)}))
    with pytest.raises(UserError, match="restore the folder"):
        load(copy)


def test_old_checkpoints_carry_rotary_frequencies(copy):
    name = "model.layers.0.attention.rotary_emb.inv_freq"
    edit_weights(copy, lambda weights: weights.update({name: torch.zeros(8)}))
    load(copy)


def test_broken_weights(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load(copy)


def test_a_missing_folder():
    with pytest.raises(UserError, match="no such model folder; check the path"):
        load("./nowhere")


def test_a_missing_run():
    with pytest.raises(UserError, match="no such model folder; check the path"):
        load("runs/nowhere")


def test_a_folder_without_config(copy):
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load(copy)


def test_a_config_that_is_no_json(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        load(copy)


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])
def test_generation_settings_that_could_not_be_saved(copy, tmp_path, device):
    """Older files set temperature without do_sample, which transformers reads with a warning and refuses to write."""
    file = copy / "generation_config.json"
    file.write_text('{"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}')
    settings = load_model(
        Model(path=str(copy)), precision="fp32", device=device
    ).transformer.generation_config
    assert (settings.do_sample, settings.temperature, settings.eos_token_id) == (True, 0.9, 2)
    settings.save_pretrained(tmp_path / "saved")
    for text, words in (
        ("no JSON", "cannot be read"),
        ('{"max_new_tokens": -5}', "cannot be used"),
        ('{"eos_token_id": [null]}', "eos_token_id.0: input should be a valid integer"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=rf"generation_config\.json: {words}.*; correct or remove it"):
            load_model(Model(path=str(copy)), precision="fp32", device=device)


def test_weights_that_are_not_safetensors(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        load(copy)


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="check the name, the network") as caught:
        load("org/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_tied_head_is_not_missed(tied_folder, tokens):
    assert "lm_head.weight" not in load_file(tied_folder / "model.safetensors")
    loaded = load(tied_folder)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_a_tied_model_saves_and_loads(tied_folder, tmp_path, tokens):
    run, trained = run_of(tied_folder, tmp_path)
    assert "lm_head.weight" not in load_file(run / "model" / "model.safetensors")
    assert torch.equal(logits(load(run), tokens), logits(trained, tokens))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_modules_trained_whole_are_saved_in_fp32(internlm2_folder, tmp_path, tokens, quantization):
    lora = LoRA(r=4, train_whole=("embed_tokens", "lm_head"))
    run, trained = run_of(internlm2_folder, tmp_path, adapter=lora, quantization=quantization)
    weights = load_file(run / "model" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert sum("lm_head" in name or "embed_tokens" in name for name in weights) == 2
    assert torch.equal(logits(load(run), tokens), logits(trained, tokens))


def test_a_peft_folder_from_elsewhere_is_continued(internlm2_folder, tmp_path, tokens):
    run, trained = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4))
    (run / "model" / "tuner.json").unlink()
    loaded = load(run / "model")
    assert loaded.adapter is None
    assert torch.equal(logits(loaded, tokens), logits(trained, tokens))


def test_peft_itself_reads_the_adapter(internlm2_folder, tmp_path, tokens):
    from peft import AutoPeftModelForCausalLM

    run, trained = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4))
    model = AutoPeftModelForCausalLM.from_pretrained(run / "model")
    with torch.no_grad():
        theirs = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(theirs, logits(trained, tokens), atol=1e-6, rtol=0)


def test_the_record_says_where_the_base_is(internlm2_folder, tmp_path):
    run, _ = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4), rope=Rope(scaling="dynamic", factor=2.0))
    record = json.loads((run / "model" / "tuner.json").read_text())
    assert record["base"]["path"] == str(internlm2_folder)
    assert record["base"]["rope"]["scaling"] == "dynamic"
    assert record["base"]["quantization"] is None
    assert load(run).transformer.config.rope_parameters["rope_type"] == "dynamic"


def test_a_damaged_record(internlm2_folder, tmp_path):
    run, _ = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4))
    (run / "model" / "tuner.json").write_text("{}")
    with pytest.raises(UserError, match=r"tuner\.json: base: is required"):
        load(run)


def test_targets_that_match_nothing(internlm2_folder):
    with pytest.raises(UserError, match=r"adapter\.targets: no module of the model is named 'wqkv'.*q_proj"):
        load(internlm2_folder, adapter=LoRA(r=4, targets=("q_proj", "wqkv")))


def test_whole_modules_that_match_nothing(internlm2_folder):
    with pytest.raises(UserError, match=r"adapter\.train_whole.*'wte'"):
        load(internlm2_folder, adapter=LoRA(r=4, train_whole=("wte",)))


def test_the_tokenizer_comes_from_the_run(internlm2_folder, tmp_path):
    run, trained = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4))
    text = "<|im_start|>user\n请 hello<|im_end|>\n"
    assert load_tokenizer(Model(path=str(run)))(text) == trained.tokenizer(text)


def test_a_folder_without_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load(copy)


# Without weights


META = torch.device("meta")


def shapes(loaded):
    return {
        name: (tuple(weight.shape), weight.dtype, weight.requires_grad)
        for name, weight in loaded.model.named_parameters()
    }


@pytest.mark.parametrize("head", ["language", "score"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", [None, LoRA(r=4), LoRA(r=4, train_whole=("embed_tokens",))])
def test_the_same_model_is_built_without_weights(internlm2_folder, adapter, precision, head):
    options = {
        "precision": precision,
        "adapter": adapter,
        "head": head,
        "freeze": Freeze(all_but_last_layers=1),
    }
    model = Model(path=str(internlm2_folder))
    real, meta = (load_model(model, device=device, **options) for device in (CPU, META))
    assert shapes(meta) == shapes(real)
    assert all(weight.is_meta for weight in meta.model.parameters())
    assert (meta.adapter, meta.precision) == (real.adapter, real.precision)
    assert meta.tokenizer.get_vocab() == real.tokenizer.get_vocab()
    assert not meta.model.training


def test_a_saved_adapter_is_built_without_its_weights(internlm2_folder, tmp_path):
    run, saved = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4), quantization="nf4", precision="bf16")
    (run / "model/adapter_model.safetensors").unlink()
    loaded = load_model(Model(path=str(run)), precision="bf16", device=META)
    assert {name for name, *_ in loaded.model.named_parameters()} == {
        name for name, *_ in saved.model.named_parameters()
    }
    assert loaded.base.quantization == "nf4"
    assert loaded.adapter == LoRA(r=4)
    trained = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}


def test_no_weights_are_needed(copy):
    folder = copy
    for file in folder.glob("*.safetensors"):
        file.unlink()
    load_model(Model(path=str(folder)), precision="bf16", device=META)
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adapter": LoRA(targets=("nothing",))},
            "adapter.targets: no module of the model is named 'nothing'",
        ),
        ({"adapter": LoRA(train_whole=("nothing",))}, "adapter.train_whole: no module"),
        ({"freeze": Freeze(names=("nothing",))}, "freeze.names: 'nothing' matches no trained weight"),
        ({"freeze": Freeze(all_but_last_layers=99)}, "give fewer"),
    ],
)
def test_what_is_refused_is_refused_without_weights(internlm2_folder, options, message):
    for device in (CPU, META):
        with pytest.raises(UserError, match=message):
            load_model(Model(path=str(internlm2_folder)), precision="fp32", device=device, **options)


def test_a_saved_adapter_refuses_other_values_without_weights(internlm2_folder, tmp_path):
    run, _ = run_of(internlm2_folder, tmp_path, adapter=LoRA(r=4), quantization="nf4", precision="bf16")
    model = Model(path=str(run))
    for device in (CPU, META):
        with pytest.raises(UserError, match=r"adapter.r=8: the adapter in .* has 4"):
            load_model(model, precision="bf16", device=device, adapter=LoRA(r=8))
        with pytest.raises(UserError, match="write precision=bf16"):
            load_model(model, precision="fp32", device=device)
