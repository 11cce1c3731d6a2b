"""The lists of tests name tests that exist."""

import ast
import re

import pytest

from tests.conftest import ROOT, soak_names


def named_in(list_of_tests: str) -> list[tuple[str, str]]:
    """(file below tests/, function) of every test that a list names."""
    if list_of_tests.endswith(".txt"):
        parts = [name.removeprefix("tests/").split("::") for name in soak_names()]
        return [(file, function.split("[")[0]) for file, function in parts]
    return re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "tests" / list_of_tests).read_text(encoding="utf-8"))


@pytest.mark.parametrize("list_of_tests", ["traps.md", "cases.md", "soak/longer.txt"])
def test_every_test_named_in_the_list_exists(list_of_tests):
    named = named_in(list_of_tests)
    assert len(named) > 20
    for file, function in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
            file,
            function,
        )
