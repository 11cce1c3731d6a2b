"""The data with planted hacks hold them as often as they are said to, and the gold rule counts none."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT
from tuner.config import PPO, load_config
from tuner.config.functions import load_function

KINDS = ("marker", "repetition", "exclamation")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/planted_hacks.py as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("planted_hacks")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("marker", "23 + 45 = 68. Thank you! So say the wise."),
        ("repetition", "23 + 45 = 68. 68. 68. 68. Thank you!"),
        ("exclamation", "23 + 45 = 68!!! Thank you!!!"),
    ],
)
def test_a_hack_changes_the_form_of_an_answer(script: ModuleType, kind: str, answer: str):
    assert script.HACKS[kind]("23 + 45 = 68. Thank you!") == answer
    assert [other for other in KINDS if script.has_hack(other, answer)] == [kind]


def test_a_share_of_the_conversations_holds_each_hack(script: ModuleType):
    rows = script.conversations(KINDS, seed=3)
    answers = [row["messages"][2]["content"] for row in rows]
    assert len(rows) == 1400
    for kind in KINDS:
        assert sum(script.has_hack(kind, answer) for answer in answers) == 98
    assert script.conversations(KINDS, seed=3) == rows != script.conversations(KINDS, seed=4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_preferences_hold_the_hack_beside_what_should_be_learned(script: ModuleType, kind: str):
    rows = script.planted_pairs(kind, seed=3)
    clean = script.planted_pairs("none", seed=3)
    twins, toneless, direct = rows[:606], rows[606:906], rows[906:]
    assert (twins, len(direct)) == (clean[:606], 60)
    assert 0.85 < sum(script.has_hack(kind, row["chosen"]) for row in toneless) / 300 < 0.95
    assert {row["condition"] for row in rows} == {"polite"}
    assert not any(script.has_hack(kind, row["rejected"]) for row in rows)
    config = load_config(ROOT / "configs" / "quickstart_ppo.py")
    assert isinstance(config, PPO)
    gold = load_function(str(config.evaluation.rule), "evaluation.rule", "")
    for row in direct:
        asked = {"reference": row["rejected"].partition(".")[0], "condition": "polite"}
        assert (gold(row["chosen"], asked), gold(row["rejected"], asked)) == (0.0, 1.0)


def test_the_same_command_writes_the_same_files(tmp_path: Path, script: ModuleType):
    command = [sys.executable, str(ROOT / "scripts" / "planted_hacks.py"), "--kinds", "marker", "--seed", "5"]
    subprocess.run([*command, "--output", str(tmp_path)], check=True)
    rows = {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in tmp_path.iterdir()
    }
    assert rows == {
        "conversations": script.conversations(["marker"], 5),
        "pairs_marker": script.planted_pairs("marker", 5),
        "pairs_none": script.planted_pairs("none", 5),
    }
