"""Attention for packed rows: which backend is chosen, and what transformers is not asked for."""

import sys
import types

import pytest
import torch
from transformers import masking_utils

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
    varlen.has_kernels.cache_clear()
    try:
        assert varlen.has_kernels(torch.device("cuda", 0)) is expected
        assert not varlen.has_kernels(CPU)
    finally:
        varlen.has_kernels.cache_clear()


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
