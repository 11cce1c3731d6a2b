"""Rows of files, each with its line; and what a missing, empty or broken file says."""

import gzip
import json

import pytest

from tuner.config.data import Source
from tuner.data.sources import Rows
from tuner.data.turns import Cell
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


ROWS = [{"text": "a"}, {"text": "b", "tags": [{"x": 1}]}, {"text": "c"}]
FORMS = {
    "a row over several lines": (json.dumps(ROWS[1], indent=1), [1]),
    "rows over several lines": ("\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 4, 12]),
    "a list": (json.dumps(ROWS), [1, 1, 1]),
    "a list over several lines": (json.dumps(ROWS, indent=1), [2, 5, 13]),
    "lists one after another": (f"{json.dumps(ROWS[:1])}\n{json.dumps(ROWS[1:])}", [1, 2, 2]),
    "rows under a key": (json.dumps({"version": {"data": [1]}, "data": ROWS}, indent=1), [8, 11, 19]),
    "rows under LMFlow's key": (json.dumps({"type": "text_only", "instances": ROWS}), [1, 1, 1]),
    "lines": ("\n".join(map(json.dumps, ROWS)), [1, 2, 3]),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_json_is_read_in_every_form_with_the_line_each_row_begins_on(tmp_path, form, suffix):
    text, lines = FORMS[form]
    path = tmp_path / f"a.{suffix}"
    path.write_text(text)
    rows = list(Rows(Source(path=str(path))))
    if suffix == "jsonl" and form == "rows under LMFlow's key":
        assert [row.values for row in rows] == [json.loads(text)]  # a line is a row
        return
    assert [row.values for row in rows] == (ROWS if len(lines) == 3 else [ROWS[1]])
    assert [row.line for row in rows] == lines


def test_an_object_is_a_row_unless_all_rows_are_under_one_key(write, tmp_path):
    for row in ({"messages": ROWS}, {"data": ["a"]}, {"data": ROWS, "rows": ROWS}, {"data": {"a": ROWS}}):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(row, indent=1))
        assert [row.values for row in Rows(Source(path=str(path)))] == [row]
    path.write_text(f"{json.dumps({'data': ROWS})}\n{json.dumps({'data': ROWS})}")
    assert origins(path) == [f"{path}:1", f"{path}:2"]


def test_compressed_files_are_read_whatever_their_suffix(write, tmp_path):
    import pyarrow

    text = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(text))
    (tmp_path / "c.json.gz").write_bytes(text)
    with pyarrow.output_stream(tmp_path / "d.jsonl.zst", compression="zstd") as stream:
        stream.write(text)
    for name in ("a.jsonl.gz", "b.jsonl", "c.json.gz", "d.jsonl.zst"):
        rows = list(Rows(Source(path=str(tmp_path / name))))
        assert [(row.line, row.values) for row in rows] == list(enumerate(ROWS, 1))
    whole = gzip.compress(text * 1000)
    (tmp_path / "e.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "e.jsonl.gz", r"e\.jsonl\.gz:\d+: the file cannot be read further .*ended before")
    zstd = (tmp_path / "d.jsonl.zst").read_bytes()
    (tmp_path / "f.jsonl.zst").write_bytes(zstd[:20])
    refused(tmp_path / "f.jsonl.zst", r"f\.jsonl\.zst:1: the file cannot be read further")


def test_cells_of_csv_are_texts_until_something_else_is_wanted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffprompt,output,weight\n"a,\n""b""",7,0.5\n\nc,{},\n', encoding="utf-8")
    rows = list(Rows(Source(path=str(path))))
    assert [row.line for row in rows] == [2, 5]
    assert [row.values for row in rows] == [
        {"prompt": 'a,\n"b"', "output": "7", "weight": "0.5"},
        {"prompt": "c", "output": "{}", "weight": None},
    ]
    assert all(isinstance(value, Cell) for value in rows[0].values.values())
    long = "x" * 200_000
    path.write_text(f"a,b\n1,{long}\n")
    assert [row.values["b"] for row in Rows(Source(path=str(path)))] == [long]


def test_broken_csv_names_its_line(tmp_path):
    for text, message in (
        ("a,b\n1,2\n1,2,3\n", "3: 3 cells, and the header has 2"),
        ('a,b\n1,2\n3,"4\n\n', "3: broken CSV .unexpected end of data"),
        ("a,b,a\n1,2,3\n", "1: two columns are named 'a'"),
    ):
        (tmp_path / "a.csv").write_text(text)
        refused(tmp_path / "a.csv", rf"a\.csv:{message}")


def test_arrow_files_and_saved_datasets_are_read(tmp_path):
    import datasets
    import pyarrow

    table = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(str(tmp_path / "splits"))
    for kind, writer in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with writer(str(tmp_path / f"{kind}.arrow"), table.data.schema) as file:
            file.write_table(table.data.table)
        assert origins(tmp_path / f"{kind}.arrow") == [f"{tmp_path}/{kind}.arrow:{line}" for line in (1, 2)]
    assert origins(tmp_path / "saved") == [f"{tmp_path}/saved:1", f"{tmp_path}/saved:2"]
    assert origins(tmp_path / "splits", limit=1) == [f"{tmp_path}/splits/train:1"]
    (row,) = Rows(Source(path=str(tmp_path / "splits"), split="test"))
    assert row.values == {"text": "b"}
    with pytest.raises(UserError, match=r"no split 'dev' in this folder; set .* to one of test, train"):
        Rows(Source(path=str(tmp_path / "splits"), split="dev"))
    with pytest.raises(UserError, match="this is a file; leave them out"):
        Rows(Source(path=str(tmp_path / "saved"), split="test"))
    before = Rows(Source(path=str(tmp_path / "saved"))).identity()
    table.select([1]).save_to_disk(str(tmp_path / "saved"))
    assert Rows(Source(path=str(tmp_path / "saved"))).identity() != before


def test_a_table_teaches_no_nulls(tmp_path):
    """A column of objects has the keys of all rows; what a row lacks is null there, and absent in JSON."""
    datasets = pytest.importorskip("datasets")
    calls = [
        {"name": "weather", "arguments": {"city": "Rome"}},
        {"name": "add", "arguments": {"x": 1, "y": [2]}},
    ]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        assert [row.values for row in Rows(Source(path=str(path)))] == rows


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
    refused(write("b.jsonl", [[1, 2]]), r"b\.jsonl:1: a row is a JSON object, not list")
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
    (tmp_path / "g.xlsx").write_text("a,b")
    refused(tmp_path / "g.xlsx", "files end in .jsonl")
    (tmp_path / "g.parquet.gz").write_text("a,b")
    refused(tmp_path / "g.parquet.gz", "files end in .jsonl")
    (tmp_path / "h.parquet").write_text("nope")
    refused(tmp_path / "h.parquet", "no Parquet file")


def test_torn_and_binary_files_are_one_sentence(write, tmp_path, capfd):
    import datasets

    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + b"\0" * 4096)
    refused(file, r"a\.jsonl:2: NUL bytes")
    (tmp_path / "a.txt").write_bytes(b"a\n\n\0b")
    refused(tmp_path / "a.txt", r"a\.txt:3: NUL bytes")
    file.write_bytes('{"text": "a"}'.encode("utf-16"))
    refused(file, r"a\.jsonl:1: NUL bytes, as in binary data, UTF-16")
    deep = f'{{"a": {"[" * 101}{"]" * 101}}}'
    refused(write("b.jsonl", {"text": "a"}, deep), r"b\.jsonl:2: .*nested too deeply")
    refused(write("b.jsonl", f'{{"a": {"[" * 99_999}'), r"b\.jsonl:1: .*nested too deeply")
    (tmp_path / "b.json").write_text(f'{{"data": [\n{{"text": "a"}},\n{deep}]}}')
    refused(tmp_path / "b.json", r"b\.json:3: .*nested too deeply")
    (tmp_path / "c.json").write_text('[{"text": "a"},\n{"text": "\\ud83d"}]')
    refused(tmp_path / "c.json", r"c\.json:2: \\ud83d is half of a character")
    (tmp_path / "d.json").write_text('[\n{"text": "a"},\n')
    refused(tmp_path / "d.json", r"d\.json:3: broken JSON")
    table = datasets.Dataset.from_list([{"text": "a"}])
    table.to_parquet(tmp_path / "e.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    capfd.readouterr()
    for path, whole in ((arrow, arrow.parent), (tmp_path / "e.parquet", tmp_path / "e.parquet")):
        path.write_bytes(path.read_bytes()[:-200])
        refused(whole, rf"{whole}: cannot be read as")
    (tmp_path / "f.arrow").write_bytes(b"junk")
    refused(tmp_path / "f.arrow", r"f\.arrow: cannot be read as Arrow")
    assert capfd.readouterr().err == ""


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
