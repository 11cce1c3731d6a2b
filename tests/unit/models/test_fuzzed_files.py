"""Whatever the JSON files of a model folder hold: it is loaded, or refused in a sentence.

Each case changes one field of one file, by a seed. `TUNER_FUZZ=5000 pytest THIS_FILE` tries more than CI does.
"""

import copy
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.config import LoRA, Model
from tuner.data.conversation import Turn
from tuner.errors import UserError
from tuner.models.chat import open_chat
from tuner.models.load import load_model
from tuner.models.merge import merge
from tuner.models.reward_record import Reference, RewardRecord, write_reward_record
from tuner.models.save import save_model
from tuner.models.scorer import open_scorer
from tuner.models.tiny import tiny_model_folder

CASES = int(os.environ.get("TUNER_FUZZ", "0"))
"""Number of cases; 0: as many as fit into SECONDS."""
SECONDS = 12
TEXTS = ["The import statement binds a name in the local scope.\n" * 8] * 4
ROWS = [{"prompt": "hello", "response": "there"}]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "7", "tuner:none", "nf4", "\udc80", "a/b", "(", [], [None], ["x"], [0], [-1], [[]], {}),
    *({"": None}, {"x": 1}, {"x": ["y"]}),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A whole model, an adapter and a reward model, which are sound."""
    root = tmp_path_factory.mktemp("fuzzed")
    base = tiny_model_folder("org/llama", root / "whole")
    options = {"precision": "fp32", "device": torch.device("cpu")}
    adapted = load_model(Model(path=str(base)), adapter=LoRA(r=2), **options)
    save_model(adapted, root / "adapter")
    scored = load_model(Model(path=str(base)), adapter=LoRA(r=2), head="score", **options)
    save_model(scored, root / "reward")
    record = RewardRecord(
        "<|reserved_special_token_0|>", {"short": ("Be short.", "Brief.")}, max_length=64, bound=5.0
    )
    write_reward_record(root / "reward", replace(record, reference=Reference(0.0, 1.0, 4), verdict=("poor",)))
    return {name: root / name for name in ("whole", "adapter", "reward")}


FILES = [
    ("whole", "config.json"),
    ("whole", "generation_config.json"),
    ("adapter", "adapter_config.json"),
    ("adapter", "tuner.json"),
    ("reward", "adapter_config.json"),
    ("reward", "tuner.json"),
    ("reward", "reward.json"),
]


def paths_of(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value, itself first."""
    yield path
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for name, value in items:
        yield from paths_of(value, (*path, name))


def changed(values: Any, path: tuple[Any, ...], value: Any, gone: bool) -> Any:
    """A JSON value with another value at a path, or none."""
    if not path:
        return value
    result = copy.deepcopy(values)
    inner = result
    for name in path[:-1]:
        inner = inner[name]
    if gone:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return result


def use(kind: str, folder: Path, output: Path) -> None:
    """What a user does with such a folder."""
    if kind == "reward":
        open_scorer(folder).score(ROWS)
        open_scorer(folder).score(ROWS, condition="short")
        return
    list(open_chat(str(folder)).answer([Turn("user", "hi")], max_new_tokens=2))
    if kind == "adapter":
        merge(folder, output, dtype="fp32", texts=TEXTS)


def case(number: int, folders: dict[str, Path], tmp_path: Path) -> str:
    """Try one case; returns what was changed, and how it ended where it is no success and no UserError."""
    draw = random.Random(number)
    kind, name = FILES[number % len(FILES)]
    folder = tmp_path / kind
    shutil.rmtree(tmp_path, ignore_errors=True)
    shutil.copytree(folders[kind], folder)
    values = json.loads((folder / name).read_text())
    path, value = draw.choice(list(paths_of(values))), draw.choice(VALUES)
    gone = draw.random() < 0.1
    (folder / name).write_text(json.dumps(changed(values, path, value, gone)))
    what = f"case {number}: {kind}/{name} {'.'.join(map(str, path))} {'is gone' if gone else f'= {value!r}'}"
    try:
        use(kind, folder, tmp_path / "merged")
    except UserError as error:
        return f"{what}: {error}" if "\n" in str(error) else ""
    except Exception as error:
        return f"{what}: {type(error).__name__}: {error}"
    return ""


@pytest.mark.filterwarnings("ignore")
def test_no_file_ends_in_a_traceback(folders, tmp_path):
    started, tried, wrong = time.monotonic(), 0, []
    while tried < CASES or (not CASES and time.monotonic() - started < SECONDS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if sentence := case(tried, folders, tmp_path / "case"):
                wrong.append(sentence)
        tried += 1
    assert not wrong, f"{len(wrong)} of {tried}:\n" + "\n".join(wrong)
