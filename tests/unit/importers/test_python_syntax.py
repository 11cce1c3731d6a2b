"""Python configs are read as syntax: what would have to be run is known to be unknown, and nothing is run."""

from pathlib import Path
from typing import Any

import pytest

from tuner.errors import UserError
from tuner.importers.keys import Block, Unread
from tuner.importers.python_syntax import read_python
from tuner.importers.python_values import Symbol

FILE = Path("theirs.py")


def read(text: str) -> Block:
    FILE.write_text(text, encoding="utf-8")
    return read_python(FILE)[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x = 1 + 2 * 3", 7),
        ("x = int(2048 - (336 / 14) ** 2)", 1472),
        ("a = 2\nx = a\nx *= 3", 6),
        ("x = -1e-4", -1e-4),
        ("x = ['a'] + ['b']", ["a", "b"]),
        ("root = './data/'\nx = root + 'a.json'", "./data/a.json"),
        ("import os.path as osp\nx = osp.join('a', 'b.json')", "a/b.json"),
        ("n = 7\nx = f'{n}b'", "7b"),
        ("a = 2\nx = 'large' if a > 1 and not False else 'small'", "large"),
        ("a = False\nif a:\n    x = 1\nelse:\n    x = 2", 2),
        ("x: int = 3", 3),
        ("x, y = 4, 5", 4),
        ("d = dict(a=1)\nx = d['a'] + d.a", 2),
        ("d = dict(a=1)\nd.a = 2\nd['a'] += 1\nx = d.a", 2),
        ("m = dict(b=dict(c=1))\nm.update(b=5)\nx = m.b", 5),
        ("m = [1]\nm.append(2)\nx = m", [1, 2]),
    ],
)  # fmt: skip
def test_literals_names_and_their_arithmetic_are_evaluated(text: str, value: Any) -> None:
    assert read(text)["x"] == value


@pytest.mark.parametrize(
    "expression",
    [
        "open('secret').read()",
        "__import__('os').system('touch ran')",
        "[i for i in range(3)]",
        "lambda: 1",
        "glob('*.json')",
        "10 ** 10 ** 10",
        "2 ** 65",
        "9 ** 9 * 9 ** 9 * 9 ** 9",
        "'a' * 10",
        "1 / 0",
        "{}['a']",
        "...",
        "b'bytes'",
    ],
)
def test_what_would_have_to_be_run_stays_unread(expression: str) -> None:
    value = read(f"import os\nfrom glob import glob\nx = {expression}")["x"]
    assert isinstance(value, Unread)
    assert value.line == 3
    assert not Path("ran").exists()


def test_a_file_that_would_harm_when_it_runs_is_read_without_harm() -> None:
    names = read(
        "import os\nos.system('touch ran')\nraise SystemExit\nfor i in [1]:\n    open('ran', 'w')\nx = 1"
    )
    assert names["x"] == 1
    assert isinstance(names["i"], Unread)
    assert not Path("ran").exists()


def test_what_is_imported_is_a_symbol() -> None:
    names = read("from xtuner.utils import PROMPT_TEMPLATE\nx = PROMPT_TEMPLATE.internlm2_chat")
    assert names["x"] == Symbol("PROMPT_TEMPLATE.internlm2_chat")


def test_blocks_know_the_lines_of_their_keys() -> None:
    names = read("model = dict(\n    type='a',\n    llm=dict(\n        path='b'))")
    assert names["model"].lines == {"type": 2, "llm": 3}
    assert names["model"]["llm"].lines == {"path": 4}


def test_a_call_with_names_alone_is_a_dict_with_a_type() -> None:
    assert read("x = LoraConfig(r=8)")["x"] == {"r": 8, "type": "LoraConfig"}


def test_names_that_nothing_reads_are_told_apart() -> None:
    FILE.write_text("a = 1\nb = 2\nb *= 2\nmodel = dict(x=a)")
    assert read_python(FILE)[1] == ["b", "model"]


def test_read_base_takes_the_names_of_files_beside_it() -> None:
    Path("_base_").mkdir()
    Path("_base_/model.py").write_text("lr = 1\nmodel = dict(a=1, b=2)")
    names = read(
        "with read_base():\n    from ._base_.model import *\n    from ._base_.model import lr as rate\n"
        "model.update(dict(b=3))\noptim = dict(lr=lr)"
    )
    assert names["model"] == {"a": 1, "b": 3}
    assert names["optim"] == {"lr": 1}
    assert names["rate"] == 1


def test_base_files_are_merged_dict_by_dict() -> None:
    Path("base.py").write_text("model = dict(a=1, b=dict(c=1, d=2))\nother = dict(a=1)")
    names = read("_base_ = ['base.py']\nmodel = dict(b=dict(d=3))\nother = dict(_delete_=True, z=1)")
    assert names["model"] == {"a": 1, "b": {"c": 1, "d": 3}}
    assert "a" not in names["other"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = (", r"theirs\.py:2: not valid Python"),
        ("\n\nx = 'a", r"theirs\.py:3: not valid Python"),
        ("x = " + "(" * 3000 + ")" * 3000, r"theirs\.py.*: (not valid Python|is nested too deeply)"),
        ("x = " + "-" * 100_000 + "1", r"theirs\.py.*: (not valid Python|is nested too deeply)"),
        ("x = " + "9" * 5000, r"theirs\.py:1: not valid Python"),
        ("", "an empty file"),
        ("\0", "binary data"),
        ("with read_base():\n    from .missing import *", r"theirs\.py:2: .*missing\.py.* is not there"),
        ("_base_ = 'theirs.py'", "in a circle"),
    ],
)  # fmt: skip
def test_broken_files_get_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(text)


def test_unreadable_files_get_one_sentence() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_python(Path("missing.py"))
    FILE.write_bytes(b"x = 1\n# \xff")
    with pytest.raises(UserError, match=r"theirs\.py:2: not UTF-8"):
        read_python(FILE)
    FILE.write_text("#" * 1_000_001)
    with pytest.raises(UserError, match="too many"):
        read_python(FILE)


def test_values_cannot_grow_without_bound() -> None:
    doubled = "x = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n" + "x = x + x\n" * 40
    assert isinstance(read(doubled)["x"], Unread)
    assert isinstance(read("x = 'abcdefgh'\n" + "x = x + x\n" * 40)["x"], Unread)
