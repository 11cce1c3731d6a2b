"""Wrong values in every field of every stage's config: each is accepted and round-trips, or is refused in a sentence.

TUNER_FUZZ=20 tries twenty times as many, and other ones, by hand.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.test_preference_rows import damaged
from tuner.config import LengthPenalty, LoRA, StageConfig, Wandb, from_json, load_config, override, to_json
from tuner.config.config_table import table
from tuner.config.registry import stage_names
from tuner.config.serialization import differences, field_paths
from tuner.errors import UserError
from tuner.printable import printable_json
from tuner.stages.check import check
from tuner.stages.preflight import preflight
from tuner.training.json_lines import replace_text

FACTOR = int(os.environ.get("TUNER_FUZZ", "1"))
OVERRIDES, DOCUMENTS, CHECKS = 1500 * FACTOR, 700 * FACTOR, 20 * FACTOR


def nested(depth: int, kind: type = list) -> Any:
    """A list in a list, or a dict in a dict, so many times."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind is list else {"path": value}
    return value


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 1.0, 0.5, -0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *(2**31, 2**63 - 1, 2**63, 2**64, -(2**63), -(10**30), 10**400),
    *(
        "",
        " ",
        "a",
        "0",
        "null",
        "nan",
        "é中文",
        "a" * 300,
        "a" * 5000,
        "\ud800",
        "a\ud800.jsonl",
        "\0",
        "\x1b[2J",
    ),
    *(
        "../x",
        "/",
        "~",
        ".",
        "tuner:",
        "tuner:tiny",
        "tuner:nosuch",
        "tuner:sums/train.jsonl",
        "*.jsonl",
        "[",
        "%s{}",
    ),
    *("a.py:b", ":b", "a/b", "runs/a", "cosine", "chat", "tokenizer", "exact", "nf4", "x\ny"),
    *(
        [],
        [[]],
        [None],
        ["a"],
        [""],
        ["\ud800"],
        ["a"] * 1000,
        [0.9, 0.999],
        [1, 2, 3],
        [{"path": "a"}],
        [{}],
    ),
    *({}, {"": 1}, {"kind": "linear"}, {"kind": "a" * 300}, {"path": "a"}, {"path": ["a"]}, {"\ud800": 1}),
    *({"r": 1}, {"function": "a.py:b"}, {"function": None}, {"test": 0.1}, {"a" * 300: "b"}),
    *(nested(30), nested(2000), nested(30, dict), nested(2000, dict)),
]
TEXTS = [*("[" * 50_000, "(" * 300, "{" * 300, "1" * 5000, "1e999", "-" * 3000, "'", '"\\ud800"', "0x", "1_0", "..."),
         *("None", "(1,", "lambda: 0", "a=b=c", "\ud800", "", "9" * 400)]  # fmt: skip


def full_configs() -> Iterator[StageConfig]:
    """The quickstart config of every stage, with the optional parts that it leaves out."""
    for stage in stage_names():
        config = load_config(f"quickstart_{stage}")
        parts: dict[str, Any] = {
            "tracking": Wandb(),
            "adapter": LoRA(),
            "length_penalty": LengthPenalty(per_token=1.0),
        }
        known = {name: value for name, value in parts.items() if name in type(config).model_fields}
        yield override(config, known)


CONFIGS = list(full_configs())


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """(result, "") of a call, or (None, the sentence) that it is refused with."""
    try:
        return function(*arguments), ""
    except UserError as error:
        message = " ".join(str(error).split())  # as the command line prints it
    assert message
    assert message.isprintable()
    message.encode()  # a console takes it
    return None, message


def assert_round_trips(config: StageConfig, folder: Path) -> None:
    """An accepted config can be shown, written, read again and compared."""
    text = to_json(config)
    replace_text(folder / "config.json", text)
    again = from_json((folder / "config.json").read_text(encoding="utf-8"))
    assert again == config
    assert differences(config, again) == []
    assert hash(again) == hash(config)
    printable_json([row.text for row in table(config, [])]).encode()


def test_every_stage_has_a_config_to_mutate() -> None:
    assert [type(config).model_fields["stage"].default for config in CONFIGS] == list(stage_names())


def test_overrides_are_taken_or_refused_in_a_sentence(tmp_path: Path) -> None:
    generator, taken = random.Random(FACTOR), 0
    texts = [*TEXTS, *filter(None, map(as_text, VALUES))]
    paths = {type(config): list(field_paths(type(config))) for config in CONFIGS}
    for _ in range(OVERRIDES):
        config = generator.choice(CONFIGS)
        path = generator.choice(paths[type(config)])
        if generator.random() < 0.1:
            path += generator.choice([".", ".0", ".a", "." + "b" * 300, "\ud800"])
        typed = generator.random() < 0.3
        changes: Any = [f"{path}={generator.choice(texts)}"] if typed else {path: generator.choice(VALUES)}
        changed, message = attempt(override, config, changes)
        if not message:
            taken += 1
            assert_round_trips(changed, tmp_path)
    assert 0.03 < taken / OVERRIDES < 0.5


def test_documents_are_taken_or_refused_in_a_sentence(tmp_path: Path) -> None:
    generator, taken = random.Random(FACTOR), 0
    documents = [json.loads(to_json(config)) for config in CONFIGS]
    pieces = ["", "[", "}", "NaN", "1e999", "9" * 5000, '"', "\\ud800"]
    for _ in range(DOCUMENTS):
        values = generator.choice(documents)
        for _ in range(generator.randrange(1, 3)):
            values = damaged(values, generator) if values else values
        text = json.dumps(values)
        if generator.random() < 0.3:
            place = generator.randrange(len(text))
            text = text[:place] + generator.choice(pieces) + text[place + 1 :]
        config, message = attempt(from_json, text)
        if not message:
            taken += 1
            assert_round_trips(config, tmp_path)
    assert 0.03 < taken / DOCUMENTS < 0.9


def test_files_with_wrong_values_are_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    for number in range(len(VALUES)):
        for part in ("AdamW(lr=value)", "LoRA(targets=value)", "Chat(files=value)", "Model(path=value)"):
            file.write_text(
                "from tests.unit.config.test_config_fuzz import VALUES\nfrom tuner.config import *\n"
                f"value = VALUES[{number}]\nconfig = {part}\n"
            )
            _, message = attempt(load_config, file)  # a part alone is no config, whatever its value
            assert message


def test_checks_end_in_a_report_or_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the config's own validation lets pass: names of files, of models and of templates, and numbers."""
    monkeypatch.chdir(tmp_path)
    generator, checked = random.Random(FACTOR), 0
    base = override(load_config("quickstart_sft"), {"data.limit": 5})
    paths = list(field_paths(type(base)))
    while checked < CHECKS:
        config, message = attempt(override, base, {generator.choice(paths): generator.choice(VALUES)})
        if message:
            continue
        checked += 1
        attempt(preflight, config, tmp_path / str(config.name))
        attempt(check, config)


def as_text(value: Any) -> str | None:
    """The value as it would be typed; None where it is too deep to be written."""
    try:
        return json.dumps(value)
    except RecursionError:
        return None
