"""The cache: a changed input is another key, a damaged entry is rebuilt, processes do not clash."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.conftest import chat, make_tokenizer
from tuner.config.data import Chat, Source, Split, Text
from tuner.data import token_cache as cache
from tuner.data.load_examples import load_examples
from tuner.data.sources import Rows


def key(tokenizer, data) -> str:
    sources = (*data.sources, *data.validation_sources, *data.test_sources)
    return cache.cache_key(data, tokenizer, [Rows(source) for source in sources])


@pytest.fixture
def path(write):
    return write("a.jsonl", chat("a", "b"), chat("c", "d"))


CHANGES = {
    "template": {"template": "qwen"},
    "system": {"system": "x"},
    "drop": {"drop": ("tools",)},
    "changed_turns": {"changed_turns": "error"},
    "learn": {"learn": "last"},
    "too_long": {"too_long": "cut"},
    "max_length": {"max_length": 99},
    "split": {"split": Split(test=0.5)},
    "duplicates": {"duplicates": "drop"},
    "limit": {"limit": 1},
    "spelled_tokens": {"spelled_tokens": {"</s>": "token"}},
    "short_rows": {"short_rows": {"below": 50}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_data_field_changes_the_key(change, path, tokenizer):
    plain = Chat(files=(path,), template="chatml")
    changed = Chat(files=(path,), **{"template": "chatml", **CHANGES[change]})
    assert key(tokenizer, plain) == key(tokenizer, Chat(files=(path,), template="chatml"))
    assert key(tokenizer, plain) != key(tokenizer, changed)


def test_every_field_of_the_config_is_in_the_key_or_known_to_be_without_effect():
    assert set(Chat.model_fields) == {*CHANGES, "kind", "files", "validation_files", "test_files", "cache"}
    assert set(Text.model_fields) < {*Chat.model_fields}
    own = {"path", "shape", "split", "subset", "share", "weight", "limit", "condition", "system"}
    assert set(Source.model_fields) == own


def test_sources_content_purpose_and_functions_change_the_key(path, write, tokenizer, tmp_path):
    def of(*files, **fields):
        return key(tokenizer, Chat(files=files or (path,), template="chatml", **fields))

    plain = of(path)
    assert of(path, cache=str(tmp_path)) == plain
    assert of(Source(path=path, share=2.0)) == plain
    assert of(Source(path=path, weight=2.0)) != plain
    assert of(Source(path=path, limit=1)) != plain
    assert of(Source(path=path, shape="messages")) != plain
    assert of(path, path) != plain
    assert of(path, test_files=(path,)) not in (plain, of(path, path), of(path, validation_files=(path,)))
    function = tmp_path / "shapes.py"
    function.write_text("def f(row):\n    return row\n")
    before = of(Source(path=path, shape=f"{function}:f"))
    function.write_text("def f(row):\n    return {**row}\n")
    assert of(Source(path=path, shape=f"{function}:f")) != before
    function.write_text("from wording import f\n")
    (tmp_path / "wording.py").write_text("def f(row):\n    return row\n")
    before = of(Source(path=path, shape=f"{function}:f"))
    assert of(Source(path=path, shape=f"{function}:f")) == before
    (tmp_path / "wording.py").write_text("def f(row):\n    return {**row}\n")
    assert of(Source(path=path, shape=f"{function}:f")) != before
    write("a.jsonl", chat("a", "b"), chat("c", "e"))
    assert of(path) != plain


def test_tokenizer_template_text_and_code_change_the_key(path, tokenizer, tmp_path, monkeypatch):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    data = Chat(files=(path,), template=str(template))
    plain = key(tokenizer, data)
    assert key(make_tokenizer(), data) == plain  # an equal tokenizer, loaded anew
    assert key(make_tokenizer(vocab_size=650), data) != plain
    other_end = make_tokenizer()
    other_end.eos_token = "<|im_end|>"
    assert key(other_end, data) != plain
    template.write_text(template.read_text() + " ")
    assert key(tokenizer, data) != plain
    again = key(tokenizer, data)
    monkeypatch.setattr(cache, "code_hash", lambda: "other")
    assert key(tokenizer, data) != again


def test_the_code_hash_covers_every_module_that_decides_tokens_and_weights():
    folder = Path(cache.__file__).parent
    shown_only = {"__init__", "inspection"}
    the_loops_own = {"packing", "batch", "stream", "prompt_stream", "replay", "subset"}
    reads_answers = {"tool_calls"}
    writes_files = {"draw_rows"}  # whose rows are read as any others
    assert {file.stem for file in folder.glob("*.py")} == {
        *cache.CODE,
        *shown_only,
        *the_loops_own,
        *writes_files,
        *reads_answers,
    }


def test_a_second_load_is_memory_mapped_and_equal(path, tokenizer, monkeypatch):
    data = Chat(files=(path,), template="chatml", test_files=(path,))
    first = load_examples(data, tokenizer)
    monkeypatch.setattr("tuner.data.dataset._build_entry", None)  # nothing may be built again
    second = load_examples(data, tokenizer)
    assert isinstance(second.train.tokens_T, np.memmap)
    for name in ("tokens_T", "weights_T", "offsets", "sources"):
        assert np.array_equal(getattr(first.train, name), getattr(second.train, name))
    assert second.train.origin(1) == first.train.origin(1)
    assert second.report == first.report
    assert second.fingerprint == first.fingerprint
    assert second.test is not None


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "meta", "empty"])
def test_a_damaged_entry_is_made_again(damage, path, tokenizer, tmp_path):
    data = Chat(files=(path,), template="chatml", cache=str(tmp_path / "own"))
    first = load_examples(data, tokenizer)
    entry = tmp_path / "own" / key(tokenizer, data)
    tokens = entry / "train.tokens_T.npy"
    if damage == "truncate":
        tokens.write_bytes(tokens.read_bytes()[:-5])
    elif damage == "flip":
        content = bytearray(tokens.read_bytes())
        content[-1] ^= 1
        tokens.write_bytes(content)
    elif damage == "remove":
        tokens.unlink()
    elif damage == "meta":
        (entry / "meta.json").write_text('{"parts": {')
    else:
        for file in entry.iterdir():
            file.unlink()
    again = load_examples(data, tokenizer)
    assert np.array_equal(first.train.tokens_T, again.train.tokens_T)
    assert cache.load_entry(tmp_path / "own", key(tokenizer, data)) is not None
    assert [path.name for path in (tmp_path / "own").iterdir() if path.is_dir()] == [entry.name]


def test_an_unwritable_cache_is_told_and_costs_nothing_else(path, tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    data = load_examples(Chat(files=(path,), template="chatml", cache=str(tmp_path / "file")), tokenizer)
    assert len(data.train) == 2
    assert "could not be cached" in str(data.report)


def test_a_failed_write_leaves_nothing_behind(path, tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_save", full)
    data = load_examples(Chat(files=(path,), template="chatml", cache=str(tmp_path / "own")), tokenizer)
    assert "No space left on device" in str(data.report)
    assert [path for path in (tmp_path / "own").iterdir() if path.is_dir()] == []


def test_processes_that_race_all_get_the_entry(path, tokenizer, tmp_path):
    data = Chat(files=(path,), template="chatml", cache=str(tmp_path / "own"))
    results = tmp_path / "results"
    results.mkdir()

    def work(number):
        loaded = load_examples(data, tokenizer)
        (results / str(number)).write_text(json.dumps(loaded.fingerprint))

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len({file.read_text() for file in results.iterdir()}) == 1
    assert len(list(results.iterdir())) == 4
    assert [path.name for path in (tmp_path / "own").iterdir() if path.is_dir()] == [key(tokenizer, data)]
