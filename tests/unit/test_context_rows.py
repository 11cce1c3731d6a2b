"""The rows that teach the embedded model the tasks over long prompts are what they are said to be."""

import importlib
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT
from tuner.config import Chat
from tuner.data.load_examples import load_examples
from tuner.evaluation.context_tasks import WORDINGS
from tuner.models.tokenizer import read_tokenizer

KEYS = {
    "en": tuple(f"thing{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    "zh": tuple("甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉戌亥金木水火土"),
}
SENTENCES = {"en": ("And it was so.", "The people went out."), "zh": ("老人在树下喝茶。",)}
LENGTHS = (512, 2_000, 4_096)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/make_context.py as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("make_context")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return read_tokenizer(ROOT / "tuner" / "embedded" / "tiny")


@pytest.fixture
def size(tokenizer: Any) -> Any:
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_conversation_is_no_longer_than_its_length(
    script: ModuleType, tokenizer: Any, size: Any, tmp_path: Path
):
    drawn = random.Random(0)
    for length in LENGTHS:
        rows = [
            script.task_row(drawn, SENTENCES[language], KEYS[language], language, length, size)
            for language in ("en", "zh") * 8
        ]
        script.write_rows(tmp_path / f"{length}.jsonl", iter(rows))
        data = Chat(files=(str(tmp_path / f"{length}.jsonl"),), template="internlm2", max_length=length)
        lengths = load_examples(data, tokenizer).train.lengths
        assert len(lengths) == len(rows)
        assert lengths.mean() > 0.8 * length


def test_an_answer_says_facts_of_the_text_and_ends_with_the_value_that_is_asked_for(
    script: ModuleType, size: Any
):
    drawn = random.Random(0)
    kinds: Counter[str] = Counter()
    for language in ("en", "zh") * 100:
        row = script.task_row(drawn, SENTENCES[language], KEYS[language], language, 512, size)
        (text, *_), turns = row["messages"][0]["content"].rsplit("\n\n", 1), row["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            asked, said = question["content"].rsplit("\n\n", 1)[-1], answer["content"]
            if "VAR" in asked:
                kinds["chain"] += 1
                links = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", said)
                assert links[0][0] == re.findall(r"VAR (\w+)", asked)[0]
                assert [source for _, source in links[:-1]] == [name for name, _ in links[1:]]
                assert links[-1][1].isdigit()
                assert all(f"VAR {name} = " in text and f"{source}." in text for name, source in links)
            else:
                kinds["keyed"] += 1
                (key,) = (key for key in KEYS[language] if said.replace(key, "") != said)
                assert asked == WORDINGS[language].question.format(key=key)
                assert said in text
    assert min(kinds["chain"], kinds["keyed"]) > 100


def test_a_recital_says_the_same_again_in_other_orders(script: ModuleType, size: Any):
    drawn, others = random.Random(0), 0
    for _ in range(50):
        text = script.recital(drawn, KEYS, 120, size)
        ends = [end for end in range(1, len(text) // 2 + 1) if len(text) % end == 0]
        # the shortest beginning of which the rest are other orders of its letters
        (first, *_) = (
            end
            for end in ends
            if all(
                Counter(text[place : place + end]) == Counter(text[:end])
                for place in range(0, len(text), end)
            )
        )
        others += text != text[:first] * (len(text) // first)
        assert size(text) < 512
    assert others > 25


def test_what_is_repeated_is_repeated_in_its_order(script: ModuleType, size: Any):
    drawn = random.Random(0)
    for _ in range(50):
        assert re.fullmatch(r"(.{4,12}?)\1+", text := script.echo(drawn, KEYS, 40, size))
        assert len(text) <= 40
        assert re.fullmatch(r"(.+?)\1+", script.medley(drawn, KEYS, 100, size))
