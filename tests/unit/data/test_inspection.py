"""What rows say once they are tokens: pieces of text, and what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.data.conftest import chat
from tuner.config.data import Chat, Text
from tuner.data.inspection import errors, notices, pieces
from tuner.data.load_examples import load_examples


@pytest.fixture
def loaded(write, tokenizer):
    rows = [chat("<script>alert(1)</script>", "外滩 & 豫园 🙂"), chat("Two?", "2"), chat("Three?", "3")]
    return load_examples(Chat(files=(write("a.jsonl", *rows),), template="chatml"), tokenizer)


def test_pieces_join_to_the_text_and_split_no_character(loaded, tokenizer):
    for index in range(len(loaded.train)):
        shown = list(pieces(loaded.train, index, tokenizer))
        tokens, weights = loaded.train.example(index)
        assert [token for piece in shown for token in piece.ids] == tokens.tolist()
        assert "".join(piece.text for piece in shown) == tokenizer.decode(tokens)
        assert all(weights[piece.position] == piece.weight for piece in shown)


def test_findings(loaded, tokenizer, write):
    train = loaded.train
    assert errors(train, tokenizer, loaded.report) == notices(train, tokenizer, loaded.report) == []
    nothing = train.weights_T.copy()
    nothing[train.offsets[1] : train.offsets[2]] = 0
    (sentence,) = errors(replace(train, weights_T=nothing), tokenizer)
    assert sentence.startswith("1 sample without a token that the loss is taken on")
    assert "a.jsonl:2" in sentence
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (sentence,) = errors(
        replace(train, weights_T=np.where(train.tokens_T == end, 0, train.weights_T)), tokenizer
    )
    assert "3 samples whose loss leaves out an end token" in sentence
    tokens = train.tokens_T.copy()
    tokens[train.offsets[2] + 1] = tokenizer.bos_token_id
    (sentence,) = errors(replace(train, tokens_T=tokens), tokenizer)
    assert "with two BOS tokens at the beginning" in sentence
    assert "a.jsonl:3" in sentence
    tokens = np.where(train.tokens_T == train.tokens_T[3], tokenizer.unk_token_id, train.tokens_T)
    assert "with unknown tokens" in notices(replace(train, tokens_T=tokens), tokenizer)[0]


def test_nothing_is_found_in_what_is_right(write, tokenizer):
    every = load_examples(
        Chat(files=(write("a.jsonl", chat("a", "b")),), template="chatml", learn="all"), tokenizer
    )
    assert errors(every.train, tokenizer, every.report) == []
    text = write("b.jsonl", {"text": "word " * 100}, {"text": "short"})
    split = load_examples(Text(files=(text,), max_length=32), tokenizer)
    assert errors(split.train, tokenizer, split.report) == []
    cut = load_examples(
        Chat(
            files=(write("c.jsonl", chat("a", "word " * 100)),),
            template="chatml",
            max_length=32,
            too_long="cut",
        ),
        tokenizer,
    )
    assert errors(cut.train, tokenizer, cut.report) == []
    assert "1 rows were cut at max_length" in notices(cut.train, tokenizer, cut.report)[0]
