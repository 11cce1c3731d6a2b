"""From files to samples: what is kept, cut, held out, weighed and counted."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.unit.data.conftest import chat
from tuner.config.data import Chat, Source, Split, Text
from tuner.data.conversation import Conversation, Turn
from tuner.data.data_report import DataReport
from tuner.data.load_examples import load_examples
from tuner.data.split import assign_part, content_hash
from tuner.errors import UserError


def load(tokenizer, *files, kind=Chat, **fields):
    if kind is Chat:
        fields = {"template": "chatml", **fields}
    return load_examples(kind(files=files, **fields), tokenizer)


def test_examples(write, tokenizer):
    path = write("a.jsonl", chat("Hi", "Hello"), chat("One?", "1", "Two?", "2"))
    train = load(tokenizer, path).train
    assert len(train) == 2
    assert train.tokens_T.dtype == np.int32
    assert train.weights_T.dtype == np.float32
    assert train.offsets.dtype == np.int64
    assert train.sources.dtype == np.int32
    assert train.lengths.tolist() == [len(train.example(i)[0]) for i in range(2)]
    assert train.origin(1) == f"{path}:2"
    assert (train.weights_T[train.offsets[:-1]] == 0).all()
    assert tokenizer.decode(train.prompt(1)) == (
        "<s><|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(train.reference(1)) == "2<|im_end|>"
    taken = train.take([1, 0, 1])
    assert [taken.origin(i) for i in range(3)] == [f"{path}:2", f"{path}:1", f"{path}:2"]
    assert np.array_equal(taken.example(1)[0], train.example(0)[0])
    assert np.array_equal(taken.example(2)[1], train.example(1)[1])


def test_nothing_heavy_is_imported():
    code = (
        "import sys, tuner.data.dataset, tuner.display.data_page; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_system_is_put_before_rows_without_one(write, tokenizer):
    own = {"messages": [{"role": "system", "content": "Mine."}, *chat("Hi", "Hello")["messages"]]}
    train = load(tokenizer, write("a.jsonl", chat("Hi", "Hello"), own), system="Yours.").train
    texts = [tokenizer.decode(train.example(i)[0]) for i in range(2)]
    assert texts[0].startswith("<s><|im_start|>system\nYours.<|im_end|>\n<|im_start|>user")
    assert texts[1].startswith("<s><|im_start|>system\nMine.<|im_end|>\n<|im_start|>user")


def test_weights_of_source_row_and_turn_multiply(write, tokenizer):
    row = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello", "weight": 2.0},
        ],
        "weight": 0.25,
    }
    train = load(tokenizer, Source(path=write("a.jsonl", row), weight=3.0)).train
    assert set(train.weights_T.tolist()) == {0.0, 1.5}


def test_sources_are_numbered(write, tokenizer):
    first, second = write("a.jsonl", chat("a", "b")), write("b.jsonl", chat("c", "d"), chat("e", "f"))
    data = load(tokenizer, first, second, test_files=(write("c.jsonl", chat("g", "h")),))
    assert data.train.sources.tolist() == [0, 1, 1]
    assert data.test is not None
    assert data.test.sources.tolist() == [2]
    assert data.validation is None


LONG = "word " * 200


def test_too_long_is_an_error_that_names_the_row(write, tokenizer):
    path = write("a.jsonl", chat("Hi", "Hello"), chat("Hi", LONG))
    with pytest.raises(UserError, match=r"a\.jsonl:2: \d+ tokens, more than max_length 64; raise max_length"):
        load(tokenizer, path, max_length=64)


def test_too_long_dropped_or_cut_is_counted(write, tokenizer):
    path = write("a.jsonl", chat("Hi", "Hello"), chat("Hi", LONG), chat(LONG, "late"))
    dropped = load(tokenizer, path, max_length=64, too_long="drop")
    (source,) = dropped.report.sources
    assert (source.rows, source.kept, source.too_long, source.dropped_too_long) == (3, 1, 2, 2)
    cut = load(tokenizer, path, max_length=64, too_long="cut")
    (source,) = cut.report.sources
    assert (source.rows, source.kept, source.too_long, source.cut, source.cut_to_nothing) == (3, 2, 2, 1, 1)
    assert cut.train.lengths.tolist() == [dropped.train.lengths[0], 64]
    assert cut.train.weights_T.sum() > 32
    assert "1 dropped because the cut left no token to take the loss on" in str(cut.report)


def test_rows_that_teach_nothing(write, tokenizer):
    off = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "learn": False}]
    }
    with pytest.raises(
        UserError, match=r"a\.jsonl:2: no token to take the loss on: every token of this row has weight 0"
    ):
        load(tokenizer, write("a.jsonl", chat("a", "b"), off))
    data = load(tokenizer, write("b.jsonl", chat("a", "b"), chat("c", "d", weight=0)))
    assert (data.report.sources[0].kept, data.report.sources[0].switched_off) == (1, 1)
    with pytest.raises(UserError, match=r"no row is left to train on: 1 rows read"):
        load(tokenizer, write("c.jsonl", chat("c", "d", weight=0)))
    empty = load(tokenizer, write("d.jsonl", chat("c", "")))
    assert "1 rows have an empty answer" in str(empty.report)


def test_text_is_bos_text_end_and_all_targets_but_the_first(write, tokenizer):
    train = load(tokenizer, write("a.jsonl", {"text": "In the beginning"}), kind=Text).train
    tokens, weights = train.example(0)
    assert tokenizer.decode(tokens) == "<s>In the beginning</s>"
    assert weights.tolist() == [0.0] + [1.0] * (len(tokens) - 1)


def test_splitting_text_loses_nothing_and_learns_every_token_once(write, tokenizer):
    documents = ["short", LONG, "word " * 61, "x"]
    path = write("a.jsonl", *({"text": text} for text in documents))
    whole = load(tokenizer, path, kind=Text, max_length=4096).train
    data = load(tokenizer, path, kind=Text, max_length=32)
    pieces = data.train
    assert pieces.lengths.max() == 32
    assert pieces.lengths.min() >= 2
    for line in range(1, 5):
        mine = [i for i in range(len(pieces)) if pieces.origin(i) == f"{path}:{line}"]
        targets = [token for i in mine for token in pieces.example(i)[0][pieces.example(i)[1] > 0].tolist()]
        assert targets == whole.example(line - 1)[0][1:].tolist()
        assert all(pieces.example(i)[1][0] == 0 for i in mine)
    assert data.report.sources[0].split == 2
    assert data.report.sources[0].pieces == len(pieces) - 2


def test_text_and_conversations_are_not_mixed_up(write, tokenizer):
    with pytest.raises(UserError, match=r"raw text, and the config wants conversations; use data=Text"):
        load(tokenizer, write("a.jsonl", {"text": "a"}))
    with pytest.raises(UserError, match=r"a conversation, and the config wants raw text; use data=Chat"):
        load(tokenizer, write("b.jsonl", chat("a", "b")), kind=Text)


def test_duplicates_are_counted_and_dropped_by_choice(write, tokenizer):
    rows = [chat("a", "b"), chat("a", "b", weight=2.0), chat("a", "c")]
    shifted = write(
        "b.jsonl", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    )
    kept = load(tokenizer, write("a.jsonl", *rows), shifted)
    assert len(kept.train) == 4
    assert [source.duplicates for source in kept.report.sources] == [1, 1]
    dropped = load(tokenizer, write("a.jsonl", *rows), shifted, duplicates="drop")
    assert [source.dropped_duplicates for source in dropped.report.sources] == [1, 1]
    assert [dropped.train.origin(i)[-1] for i in range(len(dropped.train))] == ["1", "3"]


def test_split_keeps_duplicates_together_and_its_shares(write, tokenizer):
    rows = [chat(f"question {number % 400}", f"answer {number % 400}") for number in range(1200)]
    data = load(tokenizer, write("a.jsonl", *rows), split=Split(validation=0.2, test=0.1))
    assert data.validation is not None
    assert data.test is not None
    parts = [
        {part.example(i)[0].tobytes() for i in range(len(part))}
        for part in (data.train, data.validation, data.test)
    ]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert sum(map(len, parts)) == 400
    assert 0.14 < len(parts[1]) / 400 < 0.26
    assert 0.05 < len(parts[2]) / 400 < 0.15


def test_split_by_content_does_not_depend_on_order_place_or_weight():
    split = Split(validation=0.3, test=0.3)
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    hashes = {
        content_hash(Conversation(turns, origin="a:1")),
        content_hash(Conversation((turns[0], Turn("assistant", "b", weight=2.0)), weight=0.5, origin="b:9")),
    }
    assert len(hashes) == 1
    assert content_hash(Conversation((turns[0], Turn("assistant", "c")))) not in hashes
    assert assign_part(bytes(16), split) == "test"
    assert assign_part(b"\xff" * 16, split) == "train"
    assert assign_part(bytes([128]) + bytes(15), split) == "validation"


def test_rows_held_out_by_file_and_trained_on_are_told(write, tokenizer):
    train, test = (
        write("a.jsonl", chat("a", "b"), chat("c", "d")),
        write("t.jsonl", chat("a", "b"), chat("e", "f")),
    )
    data = load(tokenizer, train, test_files=(test,))
    assert "1 rows of validation_files or test_files are trained on as well" in str(data.report)
    small = load(tokenizer, train, split=Split(validation=1e-9))
    assert "No row fell to the validation part" in str(small.report)


def test_limit_and_progress(write, tokenizer):
    path = write("a.jsonl", *(chat(str(i), "x") for i in range(600)))
    done: list[int] = []
    data = load_examples(Chat(files=(path,), template="chatml", limit=300), tokenizer, progress=done.append)
    assert len(data.train) == 300
    assert done == [256, 300]


def test_report_goes_through_json(write, tokenizer):
    report = load(tokenizer, write("a.jsonl", chat("a", "b"), chat("c", "d " * 30))).report
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    part = report.parts["train"]
    assert sum(part.histogram) == part.samples == 2
    assert part.longest == max(part.longest, 2)
    assert 0 < part.target_share < 1
    assert "2 rows read from 1 source. train: 2 samples" in str(report)


def test_fingerprint_is_of_content_not_of_origin(write, tokenizer):
    first, second = write("a.jsonl", chat("a", "b")), write("b.jsonl", chat("a", "b"))
    assert load(tokenizer, first).fingerprint == load(tokenizer, second).fingerprint
    assert load(tokenizer, first).fingerprint != load(tokenizer, first, learn="all").fingerprint
    assert load(tokenizer, first).fingerprint != load(tokenizer, write("c.jsonl", chat("a", "c"))).fingerprint
