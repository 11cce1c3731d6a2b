"""Kernels compute what the plain model does, which is proved on the model at hand; what does not is left out.

torch.compile runs with `aot_eager` where its graphs matter, and not the code that is made of them: as inductor traces,
without the seconds that a C++ compiler takes.
"""

import types
from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.shallow_models import shallow
from tuner.config import SFT, Chat, LoRA, Model, load_config, override
from tuner.config.training import EXCLUDED_BY, KernelName
from tuner.data.batch import make_batch
from tuner.errors import UserError
from tuner.models.arithmetic import Precision, autocast, compute_in_fp32
from tuner.models.checkpointing import recompute_activations
from tuner.models.forward import hidden_states, token_loss
from tuner.models.kernels import compiled, liger
from tuner.models.kernels.choice import install_kernels
from tuner.models.kernels.exact import computed_in
from tuner.models.kernels.proof import FLOOR, ROWS, Proof
from tuner.models.kernels.registry import KERNELS
from tuner.models.load import load_model
from tuner.models.tiny import tiny_model_folder

CPU = torch.device("cpu")
CONFIG = SFT(name="kernels", model=Model(path="here"), data=Chat(files=("rows.jsonl",), template="internlm2"))
DROPPED = LoRA(r=4, dropout=0.3)


@pytest.fixture
def aot_eager(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


def load(
    adapter=None,
    quantization=None,
    precision: Precision = "fp32",
    path=None,
    install=None,
    recomputation=False,
):
    path = path or shallow(2)
    loaded = load_model(
        Model(path=path, quantization=quantization), precision=precision, device=CPU, adapter=adapter, seed=0
    )
    if install is not None:
        install(loaded.model)
    recompute_activations(loaded.model, recomputation)
    torch.manual_seed(2)
    for name, weight in loaded.model.named_parameters():
        if ".lora_B." in name:  # of zeros, the adapter would take no part
            weight.data.normal_(std=0.1)
    return loaded


def packs(count):
    draw = np.random.default_rng(0)
    lengths = [draw.integers(3, 30, samples) for samples in (3, 5, 1, 2, 4, 1)[:count]]
    return [
        make_batch([(draw.integers(20, 900, n).astype(np.int32), np.ones(n, np.float32)) for n in row])
        for row in lengths
    ]


def learned(model, batches, precision: Precision = "fp32"):
    """Each pass's loss and gradients, and the compilations after it."""
    torch.manual_seed(1)
    model.train()
    passes, graphs = [], []
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for batch in batches:
        with autocast(CPU, precision):
            loss = token_loss(model, batch)
        passes.append((loss.detach(), *torch.autograd.grad(loss, weights)))
        graphs.append(counters["stats"]["unique_graphs"])
    return passes, graphs


def assert_close(passes, others, bound=FLOOR):
    for values, expected in zip(passes, others, strict=True):
        for value, right in zip(values, expected, strict=True):
            assert (value - right).norm() <= bound * right.norm()


@pytest.mark.parametrize(
    ("kind", "recomputation"),
    [({"adapter": DROPPED, "quantization": "nf4"}, True), ({}, "offload")],
    ids=["nf4 with dropout, recomputed", "full, offloaded"],
)
def test_packs_of_all_shapes_share_their_compilations(aot_eager, kind, recomputation):
    plain, _ = learned(load(**kind, recomputation=recomputation).model, packs(6))
    fast, graphs = learned(
        load(**kind, install=compiled.install, recomputation=recomputation).model, packs(6)
    )
    assert_close(fast, plain)
    assert 0 < graphs[0] == graphs[-1]


def test_layers_share_their_compilations(aot_eager):
    counts = []
    for layers in (2, 3):
        torch._dynamo.reset()
        counters.clear()
        loaded = load(path=shallow(layers), install=compiled.install)
        counts.append(learned(loaded.model, packs(1))[1][0])
    assert counts[0] == counts[1]


def test_compiled_code_drops_what_the_plain_model_drops():
    """By inductor itself."""
    reason = compiled.unavailable(CPU)
    if reason is not None:
        pytest.skip(reason)
    adapter = LoRA(r=4, dropout=0.3, targets=("q_proj", "down_proj"))
    plain, _ = learned(load(adapter, path=shallow(1)).model, packs(1))
    fast, _ = learned(load(adapter, path=shallow(1), install=compiled.install).model, packs(1))
    assert_close(fast, plain, bound=1e-3)  # with another draw all is different


def test_a_pass_with_a_cache_stays_plain(aot_eager):
    loaded = load(install=compiled.install)
    tokens = torch.arange(20, 28)[None]
    loaded.transformer.set_attn_implementation("sdpa")
    generate: Any = loaded.transformer.generate
    with torch.no_grad():
        generate(input_ids=tokens, max_new_tokens=3, do_sample=False)
    assert not counters["stats"]["unique_graphs"]


# What is wrong, and what rounds otherwise


def kernel(change):
    """One that changes the MLPs' results."""

    def install(model):
        mlps = [module for name, module in model.named_modules() if name.endswith(".mlp")]
        for mlp in mlps:
            mlp.forward = types.MethodType(lambda self, hidden: change(type(self).forward, self, hidden), mlp)
        return len(mlps)

    return types.SimpleNamespace(unavailable=lambda device: None, install=install)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, *upstream):
        return upstream[0] * 1.01


def raises(*_):
    raise RuntimeError("no such instruction")


WRONG = {
    "forward": lambda forward, mlp, hidden: forward(mlp, hidden) * 1.01,
    "backward": lambda forward, mlp, hidden: WrongBackward.apply(forward(mlp, hidden)),
    "without gradients": lambda forward, mlp, hidden: (
        forward(mlp, hidden) * (1 if torch.is_grad_enabled() else 1.01)
    ),
    "on the second shape": lambda forward, mlp, hidden: (
        forward(mlp, hidden) * (1 if hidden.shape[1] == 128 else 1.01)
    ),
    "not a number": lambda forward, mlp, hidden: forward(mlp, hidden) * torch.nan,
    "fails": raises,
}


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("fault", WRONG)
def test_a_kernel_that_is_off_by_a_percent_is_not_used(monkeypatch, fault, adapter):
    monkeypatch.setitem(KERNELS, "compile", kernel(WRONG[fault]))
    monkeypatch.delitem(KERNELS, "lora")
    loaded = load(adapter)
    before = learned(loaded.model, packs(2))[0]
    weights = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    choice = install_kernels([loaded], CONFIG, None, lambda: autocast(CPU, "fp32"))
    assert choice.names == ()
    assert ("fails here" if fault == "fails" else "is off by") in choice.left_out["compile"]
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.model.state_dict().items())
    assert_close(learned(loaded.model, packs(2))[0], before, bound=0)  # taken back whole
    with pytest.raises(UserError, match=r'kernels: "compile" .*; leave it out'):
        install_kernels([loaded], CONFIG, ["compile"], lambda: autocast(CPU, "fp32"))


def test_one_wrong_model_of_several_leaves_the_kernel_out_of_all(monkeypatch):
    def change(forward, mlp, hidden):
        return forward(mlp, hidden) * getattr(mlp, "scale", 1.0)

    monkeypatch.setitem(KERNELS, "compile", kernel(change))
    monkeypatch.delitem(KERNELS, "lora")
    models = [load(LoRA(r=4)), load(LoRA(r=4))]
    for module in models[1].model.modules():
        vars(module)["scale"] = 1.01
    assert not install_kernels(models, CONFIG, None, lambda: autocast(CPU, "fp32")).names
    assert not any("forward" in vars(module) for loaded in models for module in loaded.model.modules())


def test_in_bf16_a_kernel_may_round_elsewhere_and_no_more(monkeypatch):
    monkeypatch.setattr("tuner.models.arithmetic.computes_in_bf16", lambda device: True)

    def less_often(forward, mlp, hidden):
        """Products in fp32, rounded once."""
        with torch.autocast("cpu", enabled=False):
            return forward(mlp, hidden.float()).bfloat16()

    def coarsely(forward, mlp, hidden):
        """To six bits instead of eight."""
        result = forward(mlp, hidden)
        return result + (torch.randn_like(result) * 2.0**-5 * result.detach())

    for change, proved in ((less_often, True), (coarsely, False)):
        monkeypatch.setitem(KERNELS, "compile", kernel(change))
        loaded = load(precision="bf16")
        choice = install_kernels([loaded], CONFIG, None, lambda: autocast(CPU, "bf16"))
        assert (choice.names == ("compile",)) is proved, choice


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_reference_is_the_model_computed_in_fp32(monkeypatch, quantization):
    monkeypatch.setattr("tuner.models.arithmetic.computes_in_bf16", lambda device: True)
    loaded = load(LoRA(r=4), quantization, "bf16")
    batch = packs(1)[0]
    with torch.no_grad(), autocast(CPU, "bf16"):
        rounded = hidden_states(loaded.model, batch).float()
    with torch.no_grad(), computed_in(torch.float32, loaded.model):
        exact = hidden_states(loaded.model, batch)
    compute_in_fp32(loaded.model)
    with torch.no_grad():
        expected = hidden_states(loaded.model, batch)
    assert (exact - expected).norm() < 1e-6 * expected.norm()
    assert (rounded - expected).norm() > 1e-4 * expected.norm()


def test_a_proof_draws_no_number_of_the_run():
    loaded = load(DROPPED)
    state = torch.random.get_rng_state()
    proof = Proof(loaded, lambda: autocast(CPU, "fp32"))
    assert proof.fault() is None
    assert torch.equal(state, torch.random.get_rng_state())
    assert not loaded.model.training


# Which are there


def test_a_kernel_that_is_not_there_is_an_error_where_it_is_named(aot_eager):
    loaded = load()
    with pytest.raises(UserError, match='kernels: "liger" is for CUDA, and this is cpu; leave it out'):
        install_kernels([loaded], CONFIG, ["liger"], lambda: autocast(CPU, "fp32"))
    choice = install_kernels([loaded], CONFIG, None, lambda: autocast(CPU, "fp32"))
    assert choice.names == ("compile",)
    assert str(choice) == "kernels: compile (left out: liger excludes compile; lora excludes compile)"


def test_fused_lora_layers_are_proved_and_chosen_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "unavailable", lambda device: "has no compiler")
    choice = install_kernels([load(LoRA(r=4), "nf4")], CONFIG, None, lambda: autocast(CPU, "fp32"))
    assert choice.names == ("lora",)
    choice = install_kernels([load()], CONFIG, None, lambda: autocast(CPU, "fp32"))
    assert choice.left_out["lora"] == "has nothing to replace in this model"


def test_a_process_without_a_kernel_decides_for_all(aot_eager):
    choice = install_kernels(
        [load(LoRA(r=4))], CONFIG, None, lambda: autocast(CPU, "fp32"), lambda _: "is not on rank 1"
    )
    assert choice.left_out == dict.fromkeys(KERNELS, "is not on rank 1")


def test_every_kernel_has_an_entry():
    assert set(get_args(KernelName)) == KERNELS.keys()
    assert EXCLUDED_BY.keys() | set(EXCLUDED_BY.values()) <= KERNELS.keys()
    assert sum(ROWS[0]) != sum(ROWS[1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kernels": []}, 'name each kernel once, or write "plain" for none'),
        ({"kernels": ["compile", "compile"]}, "name each kernel once"),
        ({"kernels": ["compile", "liger"]}, '"compile" fuses what other kernels replace'),
        ({"kernels": ["compile"], "gradient_checkpointing": "selective"}, "decides by itself what it keeps"),
        ({"kernels": ["liger"], "gradient_checkpointing": "selective"}, "writes over results of products"),
        ({"kernels": ["compile", "lora"]}, '"compile" fuses what other kernels replace'),
        (
            {"kernels": ["lora"], "adapter": DROPPED},
            '"lora" excludes adapter.dropout',
        ),
        ({"kernels": ["compile"], "mlp_tile": 64}, '"compile" excludes mlp_tile'),
        ({"kernels": ["compile"], "parallel.shard": 2}, '"compile" excludes parallel'),
        ({"kernels": ["liger"], "parallel.sequence": 2}, '"liger" excludes parallel'),
    ],
)
def test_what_excludes_a_kernel_is_said(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        override(CONFIG, changes)
    if len(changes["kernels"]) == 1:  # and "auto" leaves it out for it
        config = override(CONFIG, changes | {"kernels": "auto"})
        assert sentence.rpartition('" ')[2] in (config.kernel_conflict(changes["kernels"][0]) or "")


def test_dropout_of_a_critics_adapter_excludes_fused_layers():
    config = load_config("internlm2_7b_ppo")
    adapters = {"adapter": LoRA(r=4), "critic_adapter": DROPPED}
    with pytest.raises(UserError, match=r'"lora" excludes critic_adapter\.dropout'):
        override(config, {**adapters, "kernels": ["lora"]})


# Liger's kernels need CUDA; what they take the place of is told by code alone


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("internlm2", {"LlamaRMSNorm": 5, "LlamaAttention": 2, "LlamaMLP": 2}),
        ("qwen3", {"Qwen3RMSNorm": 9, "Qwen3Attention": 2, "Qwen3MLP": 2}),
        ("mistral", {"MistralRMSNorm": 5, "MistralAttention": 2, "MistralMLP": 2}),
        ("gemma", {"GemmaRMSNorm": 5, "GemmaAttention": 2, "GemmaMLP": 2}),
    ],
)
def test_liger_takes_the_place_of_a_familys_own_modules(tmp_path, family, parts):
    tiny_model_folder(f"org/{family}", tmp_path)
    model = load(LoRA(r=4), path=str(tmp_path)).model
    before = {module: dict(vars(type(module))) for module in model.modules()}
    assert Counter(type(module).__name__ for module, _ in liger._replacements(model)) == parts
    assert (
        liger.install(model)
        == sum(parts.values())
        == sum("forward" in vars(part) for part in model.modules())
    )
    assert liger.install(model) == 0
    assert all(
        vars(type(module)) == attributes for module, attributes in before.items()
    )  # of other models, too


def test_liger_leaves_what_computes_otherwise():
    class Other(nn.Module):
        """Llama's norm without the root."""

        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, hidden_states):
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(2).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.reciprocal(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)

    assert liger.install(nn.Sequential(Other(), nn.LayerNorm(4), nn.Linear(4, 4))) == 0
