"""Attention for packed rows: which backend is chosen, and what transformers is not asked for."""

import sys
import types

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from tuner.config import Model
from tuner.data.batch import make_batch
from tuner.models import varlen
from tuner.models.forward import hidden_states
from tuner.models.load import load_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _chosen_anew():
    varlen._flash_function.cache_clear()
    yield
    varlen._flash_function.cache_clear()


def test_the_package_of_flash_attention_4_is_not_taken_for_2(monkeypatch):
    """Its wheel holds `flash_attn/cute` alone."""
    package = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    assert varlen._flash_function() is None
    varlen._flash_function.cache_clear()
    monkeypatch.setattr(package, "flash_attn_varlen_func", len, raising=False)
    assert varlen._flash_function() is len


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_before_ampere_take_the_path_by_segment(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert varlen.has_kernels(torch.device("cuda", 0)) is expected
    assert not varlen.has_kernels(CPU)


def test_no_pass_looks_for_packed_samples_in_the_positions(monkeypatch):
    """transformers reads the answer off the device: every pass would wait for it."""

    def fail(*_, **__):
        raise AssertionError("positions were searched")

    model = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU, train=False).model
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", fail)
    tokens = torch.arange(10, 22, dtype=torch.int32).numpy()
    weights = torch.ones(12).numpy()
    hidden_states(model, make_batch([(tokens[:5], weights[:5]), (tokens, weights)]))


def test_a_gpu_without_the_kernels_is_said():
    (note,) = varlen.fallback_note((7, 5), "bf16")
    assert note.startswith("this GPU (compute capability 7.5) is older than the attention kernels")
    assert varlen.fallback_note((8, 0), "bf16") == varlen.fallback_note(None, "bf16") == []
    assert varlen.fallback_note((7, 5), "fp32") == []  # no GPU has kernels for fp32
    assert len(varlen.fallback_note((7, 5), "bf16", {(192, 128)})) == 1
    assert varlen.fallback_note((8, 0), "bf16", {(64, 64), (256, 256)}) == []
    (note,) = varlen.fallback_note((9, 0), "bf16", {(128, 128), (192, 128)})
    assert "no heads of sizes 192 and 128" in note


@pytest.mark.parametrize(
    ("query", "value", "takes_kernel"), [(64, 64, True), (24, 16, False), (264, 264, False), (20, 20, False)]
)
def test_heads_that_no_kernel_takes_are_attended_by_segment(monkeypatch, query, value, takes_kernel):
    """As on a GPU whose kernel fails for them, as torch's and flash-attn's do."""
    calls = []

    def by_kernel(*arguments):
        calls.append(arguments)
        return torch.zeros(1, 2, 6, value)

    monkeypatch.setattr(varlen, "has_kernels", lambda device: True)
    monkeypatch.setattr(varlen, "_by_kernel", by_kernel)
    torch.manual_seed(0)
    queries, keys = (torch.randn(1, 2, 6, query, dtype=torch.bfloat16) for _ in range(2))
    values = torch.randn(1, 2, 6, value, dtype=torch.bfloat16)
    out, _ = varlen.varlen_attention(
        torch.nn.Module(),
        *(queries, keys, values, None),
        segment_borders=torch.tensor([0, 2, 6]),
        cu_seq_lens_q=torch.tensor([0, 2, 6], dtype=torch.int32),
        max_length_q=4,
    )
    assert bool(calls) is takes_kernel
    assert out.shape == (1, 6, 2, value)
    if not takes_kernel:  # the first token of a segment sees itself alone
        assert torch.equal(out[:, [0, 2]], values.transpose(1, 2)[:, [0, 2]])


def test_the_sizes_of_heads_are_known_when_a_model_is_loaded():
    latent = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=8,
    )
    with torch.device("meta"):
        assert varlen.head_sizes(AutoModelForCausalLM.from_config(latent)) == {(24, 16)}
    tiny = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU, train=False).transformer
    config = tiny.config
    size = config.hidden_size // config.num_attention_heads
    assert varlen.head_sizes(tiny) == {(size, size)}
