"""Families with something that packed rows, adapters or quantization meet nowhere else: trained, or refused in a
sentence, and the same on the meta device, where `tuner check` loads."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuner.config import LoRA, Model
from tuner.errors import UserError
from tuner.models.adapters import ADAPTER, activate, copy_adapter
from tuner.models.coverage import coverage
from tuner.models.dropout import switch_off_attention_dropout, switch_off_dropout
from tuner.models.generate import generate
from tuner.models.load import load_model
from tuner.models.merge import export, merge
from tuner.models.positions import Positions
from tuner.models.probe import prove_isolation
from tuner.models.save import save_model
from tuner.models.tiny import tiny_model_folder
from tuner.stages.trl_run import check_head

CPU, META = torch.device("cpu"), torch.device("meta")
TEXTS = ["The import statement binds a name in the local scope. 请给我介绍五个上海的景点。\n" * 4] * 4
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
KINDS = {
    "GPT2": {"n_positions": 64, "n_inner": 64},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "attention_dropout": 0.1, "layerdrop": 0.2},
    "Llama": {},
    "Gemma2": {"query_pre_attn_scalar": 8},
    "GptOss": {"num_local_experts": 4},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function from a kind to a folder with a random model of it, written once."""
    root = tmp_path_factory.mktemp("families")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder("org/llama", root / "tokenizer"))

    def write(kind: str) -> Path:
        if not (root / kind).is_dir():
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**SHAPE, **KINDS[kind])
            AutoModelForCausalLM.from_config(config).save_pretrained(root / kind)
            tokenizer.save_pretrained(root / kind)
        return root / kind

    return write


def load(path, device=CPU, adapter=None, precision="fp32", **model):
    return load_model(Model(path=str(path), **model), precision=precision, device=device, adapter=adapter)


def changed(loaded):
    """The same model after some training, as it were."""
    generator = torch.Generator().manual_seed(2)
    for weight in loaded.model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return loaded


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens, use_cache=False).logits


def plain(loaded):
    loaded.transformer.set_attn_implementation("sdpa")
    return loaded.model


@pytest.mark.parametrize("device", [CPU, META])
@pytest.mark.parametrize(("kind", "words"), [("Gemma2", "attn_logit_softcapping"), ("GptOss", "sinks")])
def test_attention_that_packed_rows_lack_is_refused(folder, kind, words, device):
    with pytest.raises(UserError, match=rf"the attention of {kind}ForCausalLM .*\({words}\)"):
        load(folder(kind), device)


def test_the_names_of_such_attention_are_those_of_transformers():
    """Every call in its models passes them under these names, so none is met only in training."""
    models = Path(transformers.__file__).parent / "models"
    text = "\n".join(file.read_text(encoding="utf-8") for file in models.glob("*/modeling_*.py"))
    assert set(re.findall(r"softcap=([^,)\s]+)", text)) <= {"self.attn_logit_softcapping", "None"}
    assert set(re.findall(r"s_aux=([^,)\s]+)", text)) == {"self.sinks"}


@pytest.mark.parametrize("kind", ["GPT2", "OPT"])
def test_attention_dropout_is_off_and_said(folder, kind):
    loaded = load(folder(kind))
    assert loaded.notes == (
        "attention dropout (0.1 in config.json) is off: attention over packed rows has none",
    )
    loaded.model.train()
    prove_isolation(loaded, CPU, torch.autocast("cpu", enabled=False))
    assert switch_off_attention_dropout(loaded.model) == 0
    assert load_model(Model(path=str(folder(kind))), precision="fp32", device=CPU, train=False).notes == ()


@pytest.mark.parametrize("kind", ["GPT2", "OPT"])
def test_a_policy_drops_nothing_at_all(folder, kind, tokens):
    model = plain(load(folder(kind)))
    switch_off_dropout(model)
    model.train()
    assert torch.equal(logits(model, tokens), logits(model.eval(), tokens))


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("GPT2", LoRA(r=4)),
        ("OPT", LoRA(r=4)),
        ("Mixtral", LoRA(r=4)),
        ("Qwen3Moe", LoRA(r=4, target_parameters=EXPERTS)),
        ("Qwen2Moe", LoRA(r=4, target_parameters=EXPERTS)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_saved_loaded_and_merged_exactly(folder, tmp_path, tokens, kind, adapter, quantization):
    loaded = changed(load(folder(kind), adapter=adapter, quantization=quantization))
    save_model(loaded, tmp_path / "run" / "model")
    trained = logits(plain(loaded), tokens)
    again = load(tmp_path / "run")
    assert torch.equal(logits(plain(again), tokens), trained)
    assert again.adapter == adapter
    if quantization is None:
        base = AutoModelForCausalLM.from_pretrained(folder(kind), dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "model").eval()
        torch.testing.assert_close(logits(theirs, tokens), trained, atol=1e-5, rtol=0)
    merge(tmp_path / "run", tmp_path / "merged", dtype="fp32", texts=TEXTS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, tokens), trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", [CPU, META])
def test_what_adapter_and_quantization_leave_out_is_counted(folder, device):
    """24 q, k, v, o matrices' weights are 2 layers x (2 x 32 x 32 + 2 x 16 x 32); the embedding has 1024 x 32."""
    loaded = load(folder("Qwen3Moe"), device, LoRA(r=4), quantization="nf4")
    left_out = (
        "on 6,144 of 84,224 weights of matrices; without: embed_tokens (32,768), lm_head (32,768), "
        "mlp.experts.down_proj (4,096), mlp.experts.gate_up_proj (8,192), mlp.gate (256)"
    )
    assert coverage(loaded.model, "nf4") == {"adapter": left_out, "nf4": left_out}
    assert loaded.notes == (
        f"adapter {left_out} (experts get one by adapter.target_parameters)",
        f"nf4 {left_out}",
    )
    adapted = load(folder("Qwen3Moe"), device, LoRA(r=4, target_parameters=EXPERTS))
    assert adapted.notes[0].startswith(
        "adapter on 18,432 of 84,224 weights of matrices; without: embed_tokens"
    )


def test_all_linear_layers_are_no_experts(folder):
    """peft takes the name gate_proj for the experts that transformers has fused, and leaves the shared expert out."""
    loaded = load(folder("Qwen2Moe"), META, LoRA(r=4))
    (sentence,) = loaded.notes
    assert "mlp.experts.gate_up_proj (8,192)" in sentence.partition("without")[2]
    assert not any(
        "experts" in name for name, weight in loaded.model.named_parameters() if weight.requires_grad
    )


def test_parameters_that_are_not_there(folder):
    with pytest.raises(
        UserError, match=r"named 'experts.up'; it has mlp.experts.down_proj, mlp.experts.gate_up"
    ):
        load(folder("Qwen3Moe"), META, LoRA(target_parameters=("experts.up",)))
    with pytest.raises(
        UserError, match=r"'q_proj.weight' belongs to a layer; write 'q_proj' into adapter.targets"
    ):
        load(folder("Qwen3Moe"), META, LoRA(target_parameters=("q_proj.weight",)))
    with pytest.raises(UserError, match="peft cannot put it on this model"):
        load(folder("Qwen3Moe"), META, LoRA(targets=("input_layernorm",)))
    with pytest.raises(ValueError, match="write dropout=0"):
        LoRA(dropout=0.1, target_parameters=EXPERTS)


def test_positions_end_with_the_table(folder):
    for kind in ("GPT2", "OPT"):
        assert Positions.of(load(folder(kind), META).transformer) == Positions(64, 64)
    assert Positions.of(load(folder("Llama"), META).transformer) == Positions(None, 64)
    generated = {"max_new_tokens": 8, "end_ids": {1}}
    assert len(generate(load(folder("OPT")).model, [[5] * 56], **generated)) == 1
    with pytest.raises(UserError, match="has learned positions for 64 tokens"):
        generate(load(folder("OPT")).model, [[5] * 57], **generated)


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    """A function from a type of 4 bit to a folder whose weights are in it."""

    def write(kind: str) -> Path:
        path = tmp_path_factory.mktemp("quantized") / kind
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
        model = AutoModelForCausalLM.from_pretrained(folder("Llama"), quantization_config=settings)
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(folder("Llama")).save_pretrained(path)
        return path

    return write


@pytest.mark.filterwarnings("ignore")
def test_a_base_already_in_four_bit_trains_an_adapter_alone(quantized, tmp_path, tokens):
    path = quantized("nf4")
    for device in (CPU, META):
        with pytest.raises(UserError, match=r"in nf4, which only an adapter can train; add adapter=LoRA\(\)"):
            load(path, device)
        with pytest.raises(UserError, match="quantized already, to nf4; leave it out"):
            load(path, device, LoRA(), quantization="int8")
        assert load(path, device, LoRA()).base.quantization == "nf4"
    loaded = changed(load(path, adapter=LoRA(r=4)))
    save_model(loaded, tmp_path / "run" / "model")
    assert torch.equal(logits(plain(load(tmp_path / "run")), tokens), logits(plain(loaded), tokens))
    merge(tmp_path / "run", tmp_path / "merged", dtype="fp32", texts=TEXTS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, tokens), logits(loaded.model, tokens), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_other_quantizations_are_refused(quantized):
    for device in (CPU, META):
        with pytest.raises(UserError, match="quantized in another way"):
            load(quantized("fp4"), device, LoRA())


@pytest.fixture
def longer(tied_folder, folder, tmp_path):
    """A function from a base to a copy whose tokenizer has two tokens more than its embedding has rows."""

    def write(tied: bool) -> Path:
        source = tied_folder if tied else folder("Llama")
        path = tmp_path / "longer"
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.add_tokens([f"<new {number}>" for number in range(1026 - len(tokenizer))])
        tokenizer.save_pretrained(path)
        return path

    return write


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("device", [CPU, META])
def test_a_longer_tokenizer_is_refused_with_a_way_out(longer, device, train):
    words = "has 1,026 tokens and its embedding 1,024 rows; write model.resize_embeddings=true"
    with pytest.raises(UserError, match=words):
        load_model(Model(path=str(longer(False))), precision="fp32", device=device, train=train)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapter", [None, LoRA(r=4), LoRA(r=4, train_whole=("embed_tokens",))])
@pytest.mark.filterwarnings("ignore")
def test_new_rows_are_the_mean_and_are_trained_saved_and_merged(longer, tmp_path, tied, adapter):
    if tied and adapter is not None and adapter.train_whole:
        return  # peft trains a copy of the embedding, which unties it: not about new rows
    path = longer(tied)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    loaded = load(path, adapter=adapter, resize_embeddings=True)
    assert torch.equal(torch.get_rng_state(), state)
    rows = loaded.transformer.get_input_embeddings().weight
    torch.testing.assert_close(rows[1024:], rows[:1024].mean(0).expand(2, -1))
    assert (loaded.transformer.get_output_embeddings().weight is rows) == (tied and adapter is None)
    names = {name for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    on_meta = load(path, META, adapter, resize_embeddings=True).model.named_parameters()
    assert names == {name for name, weight in on_meta if weight.requires_grad}
    tokens = torch.tensor([[5, 1024, 1025, 7, 1025, 300, 1024, 9]])
    before = logits(plain(loaded), tokens)
    assert torch.equal(before[0, :, 1024], before[0, :, 1025])
    trained = logits(plain(changed(loaded)), tokens)
    assert not torch.equal(trained[0, :, 1024], trained[0, :, 1025])
    save_model(loaded, tmp_path / "run" / "model")
    assert torch.equal(logits(plain(load(tmp_path / "run")), tokens), trained)
    if adapter is None:
        export(tmp_path / "run", tmp_path / "whole", dtype="fp32")
    else:
        merge(tmp_path / "run", tmp_path / "whole", dtype="fp32", texts=TEXTS)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert whole.config.vocab_size == 1026
    torch.testing.assert_close(logits(whole, tokens), trained, atol=1e-5, rtol=0)


def test_new_rows_beside_other_roles_and_under_trl(longer):
    """The adapter can be switched on and off; a second role and TRL's DPO would leave its rows out: both refuse."""
    loaded = load(longer(False), adapter=LoRA(r=4), resize_embeddings=True)
    tokens = torch.tensor([[5, 1024, 1025, 7]])
    off = logits(plain(loaded), tokens)
    on = logits(plain(changed(loaded)), tokens)
    activate(loaded.model, None)
    assert torch.equal(logits(loaded.model, tokens), off)
    activate(loaded.model, ADAPTER)
    assert torch.equal(logits(loaded.model, tokens), on)
    with pytest.raises(UserError, match='write roles="separate"'):
        copy_adapter(loaded.model, ADAPTER, "reference")
    with pytest.raises(UserError, match="write adapter=null, or train the new tokens by SFT first"):
        check_head(loaded)


def test_an_adapter_without_new_rows_gets_none(folder, tmp_path):
    save_model(load(folder("Llama"), adapter=LoRA(r=4)), tmp_path / "run" / "model")
    with pytest.raises(UserError, match="was trained without new rows"):
        load(tmp_path / "run", resize_embeddings=True)
