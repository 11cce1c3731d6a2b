"""The list in tests/traps.md names tests that exist."""

import ast
import re

from tests.conftest import ROOT


def test_every_test_named_in_the_list_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "tests" / "traps.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, function in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
            file,
            function,
        )
