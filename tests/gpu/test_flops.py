"""Necessary operations against numbers worked out by hand, and against a published figure."""

import numpy as np
import pytest
import torch

from benchmarks.gpu.flops import Matrices, batch_flops, training_flops
from tuner.config import LoRA, Model
from tuner.data.batch import make_batch
from tuner.models.load import load_model
from tuner.models.tiny import tiny_model_folder

SMALL = Matrices(frozen=10, trained=2, head=6, head_is_trained=False, attention=4)


def test_by_hand():
    # 5 tokens · (4 · 10 + 6 · 2) + 3 in the loss · 4 · 6 + 12 · 4 · (1 + 2 + 1 + 2 + 3) tokens seen
    assert training_flops(SMALL, [2, 3], 3) == 260 + 72 + 432
    # the head's own gradient: a half more
    assert training_flops(Matrices(10, 2, 6, True, 4), [2, 3], 3) == 260 + 108 + 432


def test_attention_is_counted_within_samples():
    """A row of samples costs what they cost alone, and less than one sample of its length."""
    parts = sum(training_flops(SMALL, [length], 0) for length in (7, 9))
    assert training_flops(SMALL, [7, 9], 0) == parts < training_flops(SMALL, [16], 0)


def test_a_models_matrices(tmp_path):
    """Hidden size 64, inner size 128, 2 layers of 4 query and 2 key heads of 16."""
    folder = tiny_model_folder("org/llama", tmp_path / "model")
    meta, model = torch.device("meta"), Model(path=str(folder))
    loaded = load_model(model, precision="bf16", device=meta, adapter=LoRA(r=4))
    vocabulary = loaded.transformer.config.vocab_size
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    adapter = 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    expected = Matrices(2 * layer, 2 * adapter, 64 * vocabulary, False, 2 * 4 * 16)
    assert Matrices.of(loaded) == expected
    whole = load_model(model, precision="bf16", device=meta)
    assert Matrices.of(whole) == Matrices(0, 2 * layer, 64 * vocabulary, True, 2 * 4 * 16)


def test_a_packed_row():
    tokens = np.arange(5, dtype=np.int32)
    learned = np.array([0, 0, 1, 1, 0], dtype=np.float32)
    batch = make_batch([(tokens, learned), (tokens[:3], learned[:3])])
    assert batch_flops(SMALL, [batch, batch]) == 2 * training_flops(SMALL, [5, 3], 3)


def test_against_a_published_figure():
    """NeMo AutoModel: 12,473 tokens/s of Llama-3-8B's LoRA (r 16, rows of 4,096) on an H100, as 402 TFLOP/s."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    adapter = 16 * (2 * 8192 + 2 * 5120 + 3 * 18_432)
    llama = Matrices(32 * layer, 32 * adapter, 128_256 * 4096, False, 32 * 32 * 128)
    assert 12_473 * training_flops(llama, [4096], 4095) / 4096 / 1e12 == pytest.approx(402, rel=0.05)
