"""Waiting prompts and slots: memory stays within its bound, and each row sees its own tokens alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import tuner.models  # noqa: F401 (registers InternLM2)
from tuner.errors import UserError
from tuner.models.kv_cache import MOST_ROWS, RowCache, bytes_per_token
from tuner.models.waiting import Waiting


def test_prompts_join_while_the_cache_has_room():
    waiting = Waiting([3, 10, 5, 4], 2, 24)
    assert waiting.take(0, 0).tolist() == [1, 2]  # 2 × 12
    assert waiting.take(2, 12).tolist() == []
    assert waiting.take(1, 12).tolist() == [3]
    assert waiting.take(1, 6).tolist() == [0]
    assert len(waiting) == 0
    assert waiting.take(0, 0).tolist() == []


def test_there_is_always_one_row():
    waiting = Waiting([3, 10], 2, 0)
    assert [waiting.take(0, 0).tolist() for _ in range(2)] == [[1], [0]]


def test_no_prompt_is_lost_and_memory_is_bounded():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 500, 1000)
    waiting, running, taken = Waiting(lengths.tolist(), 100, 20_000), np.zeros(0, np.int64), []
    while len(waiting) or len(running):
        joined = waiting.take(len(running), int((lengths[running] + 100).max(initial=0)))
        taken += joined.tolist()
        running = np.concatenate((running, joined))
        assert len(running) * (lengths[running].max() + 100) <= 20_000
        running = running[random.random(len(running)) < 0.7]
    assert sorted(taken) == list(range(1000))
    assert len(Waiting(lengths.tolist(), 100, 10**9).take(0, 0)) == MOST_ROWS


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
        RowCache(model, 1, 7)


@pytest.fixture
def filled():
    """Two layers' worth of tokens whose keys say (row, position), from rows of 2, 5 and 3 tokens."""
    cache = RowCache(shaped("llama", num_hidden_layers=2), 3, 7)
    pack(cache, [0, 1], [0, 0], [2, 5])
    pack(cache, [2], [0], [3])
    return cache


def pack(cache, rows, starts, ends):
    """Write tokens `starts` to `ends` of these rows; returns the keys that a pass over them reads."""
    parts = zip(rows, starts, ends, strict=True)
    packed = [[row, position] for row, start, end in parts for position in range(start, end)]
    with cache.packed(np.array(rows), np.array(starts), np.array(ends)):
        return write(cache, torch.tensor(packed, dtype=torch.float32)[None, None])[0][0, 0].tolist()


def write(cache, states):
    return [cache.update(states, states, layer) for layer in (0, 1)][1]


def next_tokens(cache, rows, lengths):
    """Write the next token of every row; returns what each attends to, by its keys."""
    cache.decode(np.array(lengths))
    new = torch.tensor(list(zip(rows, lengths, strict=True)), dtype=torch.float32)[:, None, None]
    keys, values = write(cache, new)
    assert torch.equal(keys, values)
    assert cache.positions[:, 0].tolist() == lengths
    mask = cache.mask[:, 0, 0]
    return [keys[row, 0][mask[row]].tolist() for row in range(len(mask))]


def own(row, end):
    return [[row, position] for position in range(end)]


def test_a_token_sees_its_own_row_from_its_first_token_on(filled):
    assert next_tokens(filled, [0, 1, 2], [2, 5, 3]) == [own(0, 3), own(1, 6), own(2, 4)]


def test_a_piece_of_a_prompt_sees_the_pieces_before_it(filled):
    assert pack(filled, [2], [3], [6]) == own(2, 6)
    assert next_tokens(filled, [0, 1, 2], [2, 5, 6]) == [own(0, 3), own(1, 6), own(2, 7)]


def test_a_row_takes_the_place_of_one_that_ended(filled):
    """It is shorter than what stood there, and sees nothing of that."""
    next_tokens(filled, [0, 1, 2], [2, 5, 3])
    with filled.packed(np.array([1]), np.array([0]), np.array([2])):
        write(filled, torch.tensor([[9.0, 0.0], [9.0, 1.0]])[None, None])
    assert next_tokens(filled, [0, 9, 2], [3, 2, 4]) == [own(0, 4), own(9, 3), own(2, 5)]


def test_rows_move_to_other_places_and_other_memory(filled):
    next_tokens(filled, [0, 1, 2], [2, 5, 3])
    assert filled.move(np.array([0, 2]), 4, 3, 9).tolist() == [0, 2]
    assert (filled.rows, filled.capacity, filled.layers[0].keys.shape[2]) == (3, 9, 9)
    pack(filled, [2], [0], [1])
    assert next_tokens(filled, [0, 2, 2], [3, 4, 1]) == [own(0, 4), own(2, 5), own(2, 2)]
