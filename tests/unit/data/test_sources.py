"""Rows of files, each with its line; and what a missing, empty or broken file says."""

import json

import pytest

from tuner.config.data import Source
from tuner.data.sources import Rows
from tuner.errors import UserError


def origins(path, **source):
    return [row.origin for row in Rows(Source(path=str(path), **source))]


def test_lines_are_counted_with_the_blank_ones(write):
    path = write("a.jsonl", {"text": "a"}, "", {"text": "b"}, "   ", {"text": "c"})
    assert origins(path) == [f"{path}:1", f"{path}:3", f"{path}:5"]
    assert origins(path, limit=2) == [f"{path}:1", f"{path}:3"]


def test_a_byte_order_mark_is_no_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert [row.values for row in Rows(Source(path=str(path)))] == [{"text": "a"}]


def test_a_json_list_keeps_its_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "a"},\n\n {"text":\n  "b"}, {"text": "c"}\n]\n')
    assert origins(path) == [f"{path}:2", f"{path}:4", f"{path}:5"]
    path.write_text('{"text": "a"}\n{"text": "b"}\n')  # JSON lines under another name
    assert origins(path) == [f"{path}:1", f"{path}:2"]


def test_patterns_are_sorted_and_parquet_and_shipped_files_are_read(write, tmp_path):
    second, first = write("b.jsonl", {"text": "b"}), write("a.jsonl", {"text": "a"})
    assert origins(tmp_path / "*.jsonl") == [f"{first}:1", f"{second}:1"]
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}, {"text": "b"}]), tmp_path / "c.parquet")
    rows = list(Rows(Source(path=str(tmp_path / "c.parquet"))))
    assert [(row.line, row.values) for row in rows] == [(1, {"text": "a"}), (2, {"text": "b"})]
    assert len(origins("tuner:sums/train.jsonl", limit=3)) == 3


def test_text_files_are_one_document_each(tmp_path):
    (tmp_path / "a.txt").write_text("In the beginning", encoding="utf-8")
    assert [row.values for row in Rows(Source(path=str(tmp_path / "a.txt")))] == [
        {"text": "In the beginning"}
    ]


def refused(path, message):
    with pytest.raises(UserError, match=message):
        list(Rows(Source(path=str(path))))


def test_bad_files_say_where_what_and_what_to_do(write, tmp_path):
    refused(tmp_path / "none.jsonl", "no such file")
    refused("none/*.jsonl", "no file matches this pattern")
    refused(tmp_path, r"this is a folder; name the files in it, as in .*/\*\.jsonl")
    refused(write("a.jsonl", {"text": "a"}, '{"text": "b"'), r"a\.jsonl:2: broken JSON at column 13")
    refused(write("b.jsonl", [1, 2]), r"b\.jsonl:1: a row is a JSON object, not list")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    refused(tmp_path / "c.jsonl", r"c\.jsonl:2: not UTF-8 text .*save it as UTF-8")
    (tmp_path / "d.json").write_bytes(b'[\n{"text": "\xff"}]')
    refused(tmp_path / "d.json", r"d\.json:2: not UTF-8")
    (tmp_path / "e.json").write_text('[{"text": "a"},\n {"text" "b"}]')
    refused(tmp_path / "e.json", r"e\.json:2: broken JSON")
    refused(write("i.jsonl", '{"text": "a \\ud83d b"}'), r"i\.jsonl:1: \\ud83d is half of a character")
    assert len(origins(write("j.jsonl", '{"text": "\\ud83d\\ude42"}'))) == 1
    (tmp_path / "f.jsonl").write_text("\n\n")
    refused(tmp_path / "f.jsonl", "the file is empty")
    (tmp_path / "g.csv").write_text("a,b")
    refused(tmp_path / "g.csv", "files end in .jsonl")
    (tmp_path / "h.parquet").write_text("nope")
    refused(tmp_path / "h.parquet", "no Parquet file")


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'org/rows' on the Hub (ConnectionError)\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused(
        "org/rows",
        r"^org/rows: this dataset could not be loaded from the hub \(Couldn't reach .*\); check its name",
    )


def test_hub_rows_are_named_by_dataset_split_and_row(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    arguments = {}

    def load(path, subset, split):
        arguments.update(path=path, subset=subset, split=split)
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert origins("org/rows", split="test", subset="en") == ["org/rows/test:1", "org/rows/test:2"]
    assert arguments == {"path": "org/rows", "subset": "en", "split": "test"}


def test_identity_is_of_the_content(write):
    path = write("a.jsonl", {"text": "a"})
    before = Rows(Source(path=path)).identity()
    assert before == Rows(Source(path=path)).identity()
    write("a.jsonl", {"text": "b"})
    assert before != Rows(Source(path=path)).identity()
    json.dumps(before)
