"""Chunks and slots: a function of lengths and budget, and rows that end together wherever they began."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import tuner.models  # noqa: F401 (registers InternLM2)
from tuner.errors import UserError
from tuner.models import kv_cache as cache_module
from tuner.models.kv_cache import RowCache, bytes_per_token, chunks


def test_chunks_hold_what_the_budget_allows():
    lengths = [3, 10, 5, 4]
    assert [chunk.tolist() for chunk in chunks(lengths, 2, 24)] == [[1, 2], [3, 0]]  # 2 × 12, 2 × 6
    assert [chunk.tolist() for chunk in chunks(lengths, 2, 23)] == [[1], [2, 3, 0]]  # 12, 3 × 7
    assert [chunk.tolist() for chunk in chunks(lengths, 2, 0)] == [[1], [2], [3], [0]]
    assert [chunk.tolist() for chunk in chunks([], 2, 24)] == []


def test_chunks_lose_nothing_and_are_bounded():
    lengths = np.random.default_rng(0).integers(1, 500, 1000).tolist()
    parts = list(chunks(lengths, 100, 20_000))
    assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
    assert all(len(chunk) * (max(lengths[row] for row in chunk) + 100) <= 20_000 for chunk in parts)
    assert max(len(chunk) for chunk in chunks(lengths, 100, 10**9)) == cache_module.MOST_ROWS


def shaped(model_type: str, dtype: torch.dtype = torch.float32, **values):
    """What the cache asks of a model, without weights."""
    config = AutoConfig.for_model(model_type, vocab_size=8, **values)
    return SimpleNamespace(config=config, device=torch.device("cpu"), dtype=dtype)


def test_bytes_per_token_of_internlm2_7b():
    shape = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    assert bytes_per_token(shaped("internlm2", torch.bfloat16, **shape)) == 131_072
    full = shaped("internlm2", torch.float32, **shape)
    assert bytes_per_token(full) == 262_144
    with torch.autocast("cpu", torch.bfloat16):
        assert bytes_per_token(full) == 131_072


def test_layers_that_are_not_attention_are_refused():
    model = shaped("qwen3", num_hidden_layers=2)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="'linear_attention'"):
        RowCache(model, [3], 4)


@pytest.fixture
def filled(monkeypatch):
    """Two layers' worth of tokens whose keys say (row, position), from prompts of 2, 5 and 3 tokens."""
    monkeypatch.setattr(cache_module, "BLOCK", 2)
    cache = RowCache(shaped("llama", num_hidden_layers=2), [2, 5, 3], 6)
    for rows in (range(2), range(2, 3)):
        cache.prefill(rows)
        lengths = [[2, 5, 3][row] for row in rows]
        packed = [
            [row, position] for row, length in zip(rows, lengths, strict=True) for position in range(length)
        ]
        write(cache, torch.tensor(packed, dtype=torch.float32)[None, None])
    cache.start_decoding()
    return cache


def write(cache, states):
    return [cache.update(states, states, layer) for layer in (0, 1)][1]


def seen(cache, keys):
    """What each row attends to, by its keys."""
    mask = cache.mask[:, 0, 0]
    return [keys[row, 0][mask[row]].tolist() for row in range(len(mask))]


def next_tokens(cache, rows, positions):
    new = torch.tensor(list(zip(rows, positions, strict=True)), dtype=torch.float32)[:, None, None]
    keys, values = write(cache, new)
    assert torch.equal(keys, values)
    outputs = seen(cache, keys)
    cache.advance()
    return outputs


def test_a_token_sees_its_own_row_from_its_first_token_on(filled):
    rows = next_tokens(filled, [0, 1, 2], [2, 5, 3])
    assert rows == [[[row, position] for position in range(end)] for row, end in enumerate((3, 6, 4))]


def test_rows_leave_slots_are_trimmed_and_grow(filled):
    next_tokens(filled, [0, 1, 2], [2, 5, 3])
    next_tokens(filled, [0, 1, 2], [3, 6, 4])
    assert filled.is_full
    assert filled.get_seq_length() == 7
    filled.keep(np.array([0, 2]))
    assert filled.get_seq_length() == 5  # two slots were padding of both
    assert (
        filled.layers[0].keys.shape[2] == 7
    )  # 3 of the longest prompt left, twice the 2 slots for new tokens
    assert not filled.is_full
    for token in range(4):
        rows = next_tokens(filled, [0, 2], [4 + token, 5 + token])
        assert rows == [[[row, position] for position in range(end + token)] for row, end in ((0, 5), (2, 6))]
        if filled.is_full and token < 3:
            filled.keep(np.array([0, 1]))
    assert filled.is_full
