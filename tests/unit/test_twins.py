"""The reward quickstart's twins and the ready conditions are what they are said to be."""

import importlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "tuner" / "embedded" / "twins"
READY = ROOT / "data_templates" / "conditions"
READY_NAMES = ("helpful", "harmless", "honest", "math", "code", "summarize", "format")
OPPOSITES = {"brief": "detailed", "polite": "blunt", "json": "plain"}
CONDITIONS = sorted(name for pair in OPPOSITES.items() for name in pair)
# Words that carry a sentence's grammar, not its content.
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a about above after all also am among an and another any anybody are as at away back be because been being
        below between both but by can come comes did do does down each either else every everything for from get
        gets give given go goes had has have he her here him his how i if in instead into is it its just let like
        made make makes many may me mind more most must my namely nay neither never no nobody none nor not nothing
        of off on once one ones only or other others our out over own rather same shall she should show since so
        some somebody something still such take than that the their them then there these they this those though
        through to too under until up upon us was we were what whatever when where whether which whichever who
        whoever whom whose why will with without would yes yet you your""",
    )
)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {
        name: [
            json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("train", "test")
    }


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/make_twins.py as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("make_twins")
    sys.path.remove(str(ROOT / "scripts"))


def sections(file: Path) -> dict[str, list[str]]:
    """Wordings of a file: trained, unseen, novel."""
    found: dict[str, list[str]] = {"trained": []}
    current = found["trained"]
    for line in file.read_text(encoding="utf-8").splitlines():
        if line in ("# unseen", "# novel"):
            current = found.setdefault(line[2:], [])
        elif line and not line.startswith("# "):
            current.append(line)
    return found


def content_words(text: str) -> set[str]:
    """Words that are no stop words, without common endings."""
    words = set(re.findall(r"[a-z]+", text.lower())) - STOP_WORDS
    return {re.sub(r"(?<=...)(ness|ing|ed|es|ly|s|e)$", "", word) for word in words}


def pairs_of_characters(text: str) -> set[str]:
    """Chinese characters side by side, but for pairs of mere grammar: two make most words."""
    pairs = {first + second for first, second in itertools.pairwise(text)}
    return {pair for pair in pairs if re.fullmatch(r"[\u4e00-\u9fff]{2}", pair)} - {"不能", "不应", "都不"}


def twin_pairs(rows: list[dict[str, str]]) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Neighbours with the same prompt and the same two answers, the other way round."""
    return [
        (first, second)
        for first, second in itertools.pairwise(rows)
        if (first["prompt"], first["chosen"], first["rejected"])
        == (second["prompt"], second["rejected"], second["chosen"])
    ]


def unflipped(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows that are no twins."""
    twins = {id(row) for pair in twin_pairs(rows) for row in pair}
    return [row for row in rows if id(row) not in twins]


def test_the_script_writes_the_committed_files(tmp_path: Path):
    command = [sys.executable, str(ROOT / "scripts" / "make_twins.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_bytes() for file in FOLDER.iterdir()}
    assert len(written) == 2 + len(CONDITIONS)


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_label_of_a_twin_agrees_with_its_rule(rows, script, name: str):
    for pair in twin_pairs(rows[name]):
        for row in pair:
            rule = script.RULES[row["condition"]]
            assert rule(row["chosen"], row["rejected"]), row
            assert not rule(row["rejected"], row["chosen"]), row


def test_the_rules_by_hand(script):
    rules = script.RULES
    assert rules["brief"]("It is 5.", "It is 5, since 2 and 3 make 5.")
    assert not rules["brief"]("It is 5.", "It is 5 now.")
    assert rules["polite"]("Thank you. 5.", "Obviously 5.")
    assert not rules["polite"]("Thank you. 5.", "Please: 5.")
    assert rules["json"]('{"answer": "5"}', '{"answer": 5')
    assert not rules["json"]('["5"]', "5")
    assert rules["plain"]("5", '{"answer": "5"}')


def test_twins_are_opposite_and_many(rows):
    for name, fewest in (("train", 1000), ("test", 300)):
        pairs = twin_pairs(rows[name])
        assert len(pairs) >= fewest
        assert all(OPPOSITES[first["condition"]] == second["condition"] for first, second in pairs)
        per_condition = Counter(first["condition"] for first, _ in pairs)
        assert min(per_condition.values()) > len(pairs) / 4


def test_unflipped_rows_do_not_depend_on_the_condition(rows):
    for name, fewest in (("train", 300), ("test", 100)):
        found = unflipped(rows[name])
        assert len(found) >= fewest
        assert {row.get("condition") for row in found} == {*CONDITIONS, None}
        # no row says the opposite of another, whatever the condition
        labels = {(row["prompt"], row["chosen"], row["rejected"]) for row in found}
        assert not any((prompt, rejected, chosen) in labels for prompt, chosen, rejected in labels)


def test_sums_and_comparisons_are_right(rows):
    for row in rows["train"] + rows["test"]:
        for a, b, result in re.findall(r"(\d+) \+ (\d+) = (\d+)", row["chosen"]):
            assert int(a) + int(b) == int(result)
        larger = re.search(r"(\d+) is larger", row["chosen"])
        if larger:
            assert int(larger[1]) == max(map(int, re.findall(r"\d+", row["prompt"])))


def test_no_row_twice_and_no_test_prompt_in_training(rows):
    keys = [tuple(sorted(row.items())) for row in rows["train"] + rows["test"]]
    assert len(keys) == len(set(keys))
    assert not {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows["test"]}


def test_test_questions_are_not_in_training_in_other_words(rows):
    def questions(name: str) -> set[tuple[str, ...]]:
        found = set()
        for row in rows[name]:
            numbers = tuple(sorted(re.findall(r"\d+", row["prompt"])))
            thing = re.search(r"\ban? (\w+)", row["prompt"])
            found.add(numbers or (thing[1] if thing else row["prompt"],))
        return found

    assert not questions("train") & questions("test")


def test_the_files_are_small():
    assert sum((FOLDER / f"{name}.jsonl").stat().st_size for name in ("train", "test")) < 1.2e6


@pytest.mark.parametrize("condition", CONDITIONS)
def test_wordings(script, condition: str):
    wordings = sections(FOLDER / f"{condition}.txt")
    trained, unseen, novel = wordings["trained"], wordings["unseen"], wordings["novel"]
    assert len(trained) >= 30
    assert min(len(unseen), len(novel)) >= 6
    assert len({*trained, *unseen, *novel}) == len(trained) + len(unseen) + len(novel)

    keys = script.texts.KEY_WORDS[condition]
    pattern = re.compile(r"\b(" + "|".join(keys) + r")\b", re.IGNORECASE)
    frames = {pattern.sub("{}", wording).lower() for wording in trained}
    assert all("{}" in frame for frame in frames)
    for wording in unseen:
        assert len(pattern.findall(wording)) == 1, wording
        assert pattern.sub("{}", wording).lower() not in frames, wording

    known = set().union(*map(content_words, trained))
    for wording in novel:
        assert content_words(wording), wording
        assert not content_words(wording) & known, wording


def test_conditions_share_their_frames_so_that_only_the_key_word_tells_them_apart(script):
    for section in ("trained", "unseen"):
        frames = set()
        for condition in CONDITIONS:
            keys = re.compile(r"\b(" + "|".join(script.texts.KEY_WORDS[condition]) + r")\b", re.IGNORECASE)
            wordings = sections(FOLDER / f"{condition}.txt")[section]
            frames.add(frozenset(keys.sub("{}", wording).lower() for wording in wordings))
        assert len(frames) == 1
    words = [key for keys in script.texts.KEY_WORDS.values() for key in keys]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", READY_NAMES)
def test_ready_conditions(name: str, language: str):
    wordings = sections(READY / f"{name}.{language}.txt")
    assert len(wordings["trained"]) >= 24
    assert len(wordings["unseen"]) >= 6
    assert len(wordings["novel"]) >= 4
    every = [wording for section in wordings.values() for wording in section]
    assert len(every) == len(set(every))
    assert all(wording == wording.strip() for wording in every)
    chinese = [bool(re.search(r"[\u4e00-\u9fff]", wording)) for wording in every]
    assert all(chinese) if language == "zh" else not any(chinese)
    words = content_words if language == "en" else pairs_of_characters
    known = set().union(*map(words, wordings["trained"]))
    for wording in wordings["novel"]:
        assert not words(wording) & known, wording


def test_every_ready_condition_is_there_in_both_languages():
    found = {file.name for file in READY.iterdir()}
    assert found == {f"{name}.{language}.txt" for name in READY_NAMES for language in ("en", "zh")}
