"""The commands of docs/handing_over.md run one after the other, on the embedded model in place of the one they fetch.

What needs llama.cpp or lm-evaluation-harness runs where these are installed; `make demo-handover` has them.
"""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.conftest import ROOT
from tuner.resources import locate

# a dozen commands, each a process of its own that imports torch
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/demo_handover.py as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("demo_handover")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def done(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Heading -> what its block printed, of those that can run here."""
    folder = tmp_path_factory.mktemp("handing_over")
    # which the page's script for fetching leaves as it is, since a model is in it
    shutil.copytree(locate("tuner:tiny"), folder / "base")
    script.prepare(folder / "work", folder / "base")
    steps = [step for step in script.steps() if step.missing is None]
    return {finished.step.name: finished.output for finished in script.follow(steps, folder / "work")}


def test_the_page_can_be_followed(done: dict[str, str]) -> None:
    assert "200 rows to train on, 60 to test on" in done["Rows and a base"]
    assert "ready to train" in done["Train"]
    assert "README.md" in done["Merge"].split()
    front = done["A model card"].split("---\n")[1]
    assert yaml.safe_load(front)["library_name"] == "peft"


def test_the_server_answers_as_chat_does(done: dict[str, str]) -> None:
    chat, served = (done[name].rstrip("\n") for name in ("Train", "A server and the openai client"))
    assert chat.endswith(served)
    assert served


def test_every_block_has_a_place_for_its_output(script: ModuleType) -> None:
    text = Path(script.PAGE).read_text(encoding="utf-8")
    for name in (*(step.name for step in script.steps()), "costs"):
        begin = text.index(script.BEGIN.format(name=name))
        assert script.END in text[begin:]


def test_what_ends_the_demo(script: ModuleType) -> None:
    def done(name: str, output: str, commands: str = "") -> object:
        return script.Done(script.Step(name, commands), output, 0.0)

    def table(*scores: str) -> object:
        rows = "\n".join(f"model_{number}  {score} [0.000, 0.999]  −" for number, score in enumerate(scores))
        return done(
            "e", f"tickets: exact_match over 60 rows\nmodel  value  change\n{rows}\n", "tuner eval --tasks x"
        )

    same = [done("a", '{"team": "x"}\n'), done("b", 'words\n{"team": "x"}\n')]
    rows = done("rows", '{"messages": [{"role": "assistant", "content": "y"}]}\n')
    script.check([rows, *same, table("0.000", "0.950")])
    with pytest.raises(SystemExit, match="the answers differ"):
        script.check([*same, done("c", '{"team": "y"}\n'), table("0.000", "0.950")])
    for scores in (("0.500", "0.500"), ("0.000",), ()):
        with pytest.raises(SystemExit, match="do not rise"):
            script.check([*same, table(*scores)])
