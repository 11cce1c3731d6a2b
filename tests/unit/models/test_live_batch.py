"""Rows that join and leave a running batch get the tokens they would get alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from tuner.config import Model, Rope
from tuner.models import decoding
from tuner.models.answer_text import AnswerText
from tuner.models.generate import generate, uniforms, unpacked
from tuner.models.live_batch import LiveBatch, RowSettings, Token
from tuner.models.load import Loaded, load_model
from tuner.models.tiny import tiny_model_folder

GREEDY = RowSettings(12, temperature=0.0, num_likeliest=3)
SAMPLED = RowSettings(20, temperature=0.9, top_p=0.95)
TOP_K = RowSettings(7, temperature=1.3, top_k=5, num_likeliest=1)


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load_model(Model(path="tuner:tiny"), precision="fp32", device=torch.device("cpu"), train=False)


@pytest.fixture
def mixed(tmp_path: Path) -> Loaded:
    """A model whose rows of more than 24 tokens have frequencies of their own."""
    folder = tiny_model_folder("internlm/internlm2-7b", tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 24}))
    model = Model(path=str(folder), rope=Rope(base=3.0, length=96, mixed_window=True))
    return load_model(model, precision="fp32", device=torch.device("cpu"), train=False)


@dataclass
class Recorded:
    """A row that keeps its tokens."""

    prompt: list[int]
    settings: RowSettings
    place: int
    ends: tuple[int, ...] = ()
    tokens: list[Token] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = np.random.default_rng((3, 0, self.place))

    def noise(self) -> float:
        return self._generator.random()

    def take(self, token: Token) -> bool:
        self.tokens.append(token)
        return len(self.tokens) < self.settings.max_new_tokens and token.id not in self.ends


def rows(count: int) -> list[Recorded]:
    random = np.random.default_rng(0)
    kinds = (GREEDY, SAMPLED, TOP_K)
    return [
        Recorded(random.integers(20, 1000, random.integers(1, 90)).tolist(), kinds[place % 3], place)
        for place in range(count)
    ]


def alone(loaded: Loaded, row: Recorded) -> tuple[list[int], list[float]]:
    settings = row.settings
    (answer,) = generate(
        loaded.model,
        [row.prompt],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        end_ids=row.ends,
        noise=uniforms(3, 0, [row.place], settings.max_new_tokens) if settings.temperature else None,
    )
    return answer.tokens.tolist(), answer.logprobs.tolist()


def test_rows_that_outgrow_a_mixed_window_are_computed_anew(mixed):
    random = np.random.default_rng(0)
    greedy = RowSettings(12, temperature=0.0)
    waiting = [Recorded(random.integers(10, 1000, n).tolist(), greedy, n) for n in (20, 30, 5, 24, 23, 15)]
    started = list[Recorded]()
    with unpacked(mixed.model) as transformer, torch.no_grad():
        batch = LiveBatch(transformer)
        while waiting or batch.rows:
            started += (joining := [waiting.pop() for _ in range(min(2, len(waiting)))])
            if joining:
                batch.join(joining)
            batch.step()
    for row in started:
        tokens, logprobs = alone(mixed, row)
        assert [token.id for token in row.tokens] == tokens
        np.testing.assert_allclose([token.logprob for token in row.tokens], logprobs, atol=1e-5)


@pytest.mark.parametrize("block", [1, 64])
def test_rows_that_join_at_any_time_get_their_own_tokens(tiny, monkeypatch, block):
    monkeypatch.setattr(decoding, "BLOCK", block)
    waiting, started = rows(14), []
    for row in waiting[::4]:  # some end early
        row.ends = tuple(range(0, 2048, 5))
    joins = iter([1, 3, 0, 0, 2, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3])
    with unpacked(tiny.model) as transformer, torch.no_grad():
        batch = LiveBatch(transformer)
        while waiting or batch.rows:
            joining = [waiting.pop() for _ in range(min(next(joins, 1), len(waiting)))]
            if joining:
                most = batch.slots_with(joining)
                batch.join(joining)
                cache = batch._decoding._cache
                assert most >= cache.rows * cache.capacity
            started += joining
            batch.step()
        assert batch._decoding._cache is None, "keys and values of ended rows are given up"
    assert len({len(row.tokens) for row in started}) > 4
    for row in started:
        tokens, logprobs = alone(tiny, row)
        assert [token.id for token in row.tokens] == tokens
        if row.settings.temperature in (0, 1):
            np.testing.assert_allclose([token.logprob for token in row.tokens], logprobs, atol=2e-5)


def test_the_likeliest_tokens_are_those_of_the_distribution(tiny):
    greedy, sampled = rows(2)
    with unpacked(tiny.model) as transformer, torch.no_grad():
        batch = LiveBatch(transformer)
        batch.join([greedy, sampled])
        batch.step()
    (token,) = greedy.tokens
    assert [token.id, token.logprob] == list(token.likeliest[0])
    assert len(token.likeliest) == 3
    assert token.likeliest[0][1] > token.likeliest[1][1] > token.likeliest[2][1]
    assert sum(np.exp(logprob) for _, logprob in token.likeliest) <= 1
    assert not sampled.tokens[0].likeliest


# The text of an answer


def pieces(tokenizer, ids, **options) -> tuple[list[str], bool]:
    text = AnswerText(tokenizer, **options)
    streamed = [text.push(token) for token in ids]
    return [*streamed, text.finish()], text.stopped


@pytest.mark.parametrize("text", ["a small 二 — piece of wood, used", "\n\n  two  spaces ", "", "é" * 9])
def test_pieces_joined_are_the_decoded_answer(tiny, text):
    ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    streamed, stopped = pieces(tiny.tokenizer, ids)
    assert ("".join(streamed), stopped) == (tiny.tokenizer.decode(ids), False)
    assert not any("�" in piece for piece in streamed)
    broken = tiny.tokenizer("二", add_special_tokens=False)["input_ids"][:1]
    if len(tiny.tokenizer("二", add_special_tokens=False)["input_ids"]) > 1:
        assert "".join(pieces(tiny.tokenizer, broken)[0]) == "�", "half a character at the end is not lost"


def test_special_tokens_are_left_out_but_for_those_shown(tiny):
    end = tiny.tokenizer.eos_token_id
    ids = [*tiny.tokenizer("a b", add_special_tokens=False)["input_ids"], end]
    assert "".join(pieces(tiny.tokenizer, ids)[0]) == "a b"
    assert "".join(pieces(tiny.tokenizer, ids, shown=(end,))[0]) == "a b" + tiny.tokenizer.eos_token


@pytest.mark.parametrize("stops", [("of w",), ("wood", "piece"), ("of", "of wood"), ("zz", "used!")])
def test_nothing_of_a_stop_text_is_streamed(tiny, stops):
    text = "a small piece of wood used"
    ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    first = min((text.find(stop) for stop in stops if stop in text), default=None)
    streamed, stopped = pieces(tiny.tokenizer, ids, stops=stops)
    assert "".join(streamed) == (text if first is None else text[:first])
    assert stopped == (first is not None)
