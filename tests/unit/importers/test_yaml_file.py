"""YAML configs with the lines of their keys; broken ones get one sentence."""

from pathlib import Path

import pytest

from tuner.errors import UserError
from tuner.importers.keys import Block
from tuner.importers.yaml_file import read_yaml

FILE = Path("theirs.yaml")


def read(text: str) -> Block:
    FILE.write_text(text, encoding="utf-8")
    return read_yaml(FILE)


def test_keys_have_lines_at_every_level() -> None:
    block = read("# comment\na: 1\nb:\n  - c: 2\n    d: 3\n")
    assert block == {"a": 1, "b": [{"c": 2, "d": 3}]}
    assert block.lines == {"a": 2, "b": 3}
    assert block["b"][0].lines == {"c": 4, "d": 5}


def test_merged_mappings_lie_under_the_keys_of_their_own() -> None:
    assert read("base: &base {a: 1, b: 2}\nown:\n  a: 3\n  <<: *base\n")["own"] == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [", r"theirs\.yaml:\d: not valid YAML"),
        ("a: 1\n\tb: 2", r"theirs\.yaml:2: not valid YAML"),
        ("- a\n- b", "holds no keys"),
        ("text", "holds no keys"),
        ("a: !!python/object/apply:os.system ['touch ran']", "not valid YAML"),
        ("a: &a [*a]", "nested too deeply|more than"),
        ("[" * 3000, r"nested too deeply|not valid YAML"),
        ("x: 2024-13-45", "not valid YAML"),
    ],
)  # fmt: skip
def test_broken_files_get_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(text)
    assert not Path("ran").exists()


def test_aliases_cannot_multiply_without_bound() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(UserError, match="more than 100,000 values"):
        read("\n".join(lines))
