"""What the quickstart's policy learns to talk like, and PPO's prompts, are what they are said to be."""

import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT
from tuner.config import PPO, load_config
from tuner.config.functions import load_function

FOLDER = ROOT / "tuner" / "embedded" / "manners"
CONFIG = ROOT / "configs" / "quickstart_ppo.py"

Rows = dict[str, list[dict[str, str]]]
Gold = Callable[[str, dict[str, str]], float]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/make_manners.py as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("make_manners")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def rows() -> Rows:
    """All files as prompt rows; of conversations with their answer."""
    found = {
        name: [
            json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("train", "pairs", "prompts", "test")
    }
    found["train"] = [
        {"prompt": row["messages"][1]["content"], "answer": row["messages"][2]["content"], **_system(row)}
        for row in found["train"]
    ]
    return found


@pytest.fixture(scope="module")
def gold() -> Gold:
    """The quickstart's own rule."""
    config = load_config(CONFIG)
    assert isinstance(config, PPO)
    assert isinstance(config.evaluation.rule, str)
    return load_function(config.evaluation.rule, "evaluation.rule", "")


def _system(row: dict) -> dict[str, str]:
    return {"system": row["messages"][0]["content"]}


def numbers(prompt: str) -> tuple[int, int]:
    first, second = sorted(map(int, re.findall(r"\d+", prompt)))
    return first, second


def test_the_script_writes_the_committed_files(tmp_path: Path):
    command = [sys.executable, str(ROOT / "scripts" / "make_manners.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_bytes() for file in FOLDER.iterdir()}
    assert len(written) == 4
    assert len(written.pop("pairs.jsonl")) < 110_000
    assert sum(map(len, written.values())) < 400_000


def test_every_answer_is_right(rows: Rows):
    for row in rows["train"]:
        ((a, b, result),) = re.findall(r"(\d+) \+ (\d+) = (\d+)", row["answer"])
        assert int(a) + int(b) == int(result)
        assert numbers(f"{a} {b}") == numbers(row["prompt"])
    for row in rows["prompts"] + rows["test"]:
        a, b, result = map(int, re.findall(r"\d+", row["reference"]))
        assert (a + b, numbers(f"{a} {b}")) == (result, numbers(row["prompt"]))


def test_held_out_sums_are_asked_nowhere_else(rows: Rows):
    held_out = {numbers(row["prompt"]) for row in rows["test"]}
    for name in ("train", "pairs", "prompts"):
        assert not held_out & {numbers(row["prompt"]) for row in rows[name]}
    for file in ("sums/train.jsonl", "twins/train.jsonl"):
        text = (ROOT / "tuner" / "embedded" / file).read_text(encoding="utf-8")
        assert not held_out & {numbers(f"{a} {b}") for a, b in re.findall(r"(\d+) \+ (\d+) = \d+", text)}


def test_no_prompt_twice_in_ppo_and_no_conversation_twice_in_sft(rows: Rows):
    conversations = [(row["prompt"], row["answer"]) for row in rows["train"]]
    assert len(conversations) == len(set(conversations)) >= 1000
    for name in ("prompts", "test"):
        asked = [row["prompt"] for row in rows[name]]
        assert len(asked) == len(set(asked)) >= 100


def test_a_system_turn_tells_these_prompts_from_the_replayed_sums(rows: Rows, script: ModuleType):
    assert {row["system"] for row in rows["train"]} == {script.SYSTEM}
    config = load_config(CONFIG)
    assert isinstance(config, PPO)
    assert {source.system for source in (*config.prompts.sources, *config.prompts.test_sources)} == {
        script.SYSTEM
    }
    sums = (ROOT / "tuner" / "embedded" / "sums" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["messages"][0]["role"] == "user" for line in sums)


def test_an_answer_without_a_tone_stands_between_both(rows: Rows, gold: Gold):
    """Twins: the same two right answers, of which the other is better under the opposite condition."""
    pairs, tones = rows["pairs"], Counter()
    for row, twin in zip(pairs[::2], pairs[1::2], strict=True):
        assert {**row, "chosen": row["rejected"], "rejected": row["chosen"], "condition": ""} == {
            **twin,
            "condition": "",
        }
        assert {row["condition"], twin["condition"]} == {"polite", "blunt"}
        reference = re.findall(r"\d+ \+ \d+ = \d+", row["chosen"])[0]
        for side, tone in (("chosen", [row["condition"]]), ("rejected", [])):
            asked = ({"reference": reference, "condition": name} for name in ("polite", "blunt"))
            assert [one["condition"] for one in asked if gold(row[side], one)] == tone
        tones[row["condition"]] += 1
    assert min(tones.values()) > 0.4 * len(pairs) / 2


def test_every_manner_is_there_and_the_gold_rule_finds_it(rows: Rows, gold: Gold, script: ModuleType):
    found = Counter()
    for row in rows["train"]:
        reference = re.findall(r"\d+ \+ \d+ = \d+", row["answer"])[0]
        manners = [
            name
            for name in script.MANNERS
            if gold(row["answer"], {"reference": reference, "condition": name})
        ]
        assert len(manners) == 1, row
        found.update(manners)
    for name, share in script.MANNERS.items():
        assert abs(found[name] / len(rows["train"]) - share) < 0.04


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        ("23 + 45 = 68.", {"brief"}),
        ("23 + 45 = 68. Thank you for your question.", {"polite"}),
        ("Only a fool asks that. 23 + 45 = 68.", {"blunt"}),
        ("23 + 45 = 68. The ones make 8, and with the tens it comes to 68.", {"detailed"}),
        ("23 + 45 = 68. Thank you, you fool.", set()),
        ("23 + 45 = 69. Thank you for your question.", set()),
        ("123 + 45 = 68. Thank you for your question.", set()),
        ("23 + 45 = 68. 23 + 45 = 69. Thank you for your question.", set()),
        ("Thank you for your question.", set()),
        ("", set()),
    ],
)
def test_the_gold_rule_by_hand(gold: Gold, answer: str, good: set[str]):
    row = {"prompt": "Hello! What is 23 + 45?", "reference": "23 + 45 = 68"}
    names = ("polite", "blunt", "brief", "detailed")
    assert {name for name in names if gold(answer, {**row, "condition": name})} == good
