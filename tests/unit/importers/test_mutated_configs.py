"""Configs with random faults: each is imported or refused in one sentence, and none has a traceback."""

import random
import re
from pathlib import Path

import pytest

from tests.unit.importers.conftest import CONFIGS, loads_as_reported
from tuner.errors import UserError
from tuner.importers.import_file import import_config

FILES = [file for file in sorted(CONFIGS.iterdir()) if file.suffix != ".md"]
VALUES = (
    "None",
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "nan",
    "[]",
    "{}",
    "''",
    "x",
    "\"'",
    "9" * 30,
    "[1, [2]]",
    "é\u202e",
    '"\\ud800"',
    "~",
)
"""What a value is replaced by."""


def mutate(text: str, random: random.Random) -> str:
    """One to three faults: a line left out, doubled, cut or indented; a value or a character replaced."""
    lines = text.splitlines()
    for _ in range(random.randint(1, 3)):
        index = random.randrange(len(lines))
        line = lines[index]
        match random.randrange(7):
            case 0:
                lines[index] = ""
            case 1:
                lines.insert(index, line)
            case 2:
                lines[index] = line[: random.randrange(len(line) + 1)]
            case 3:
                lines[index] = f"  {line}"
            case 4:
                lines[index] = re.sub(
                    r"([=:]\s*)[^=:,()]+", lambda match: match[1] + random.choice(VALUES), line, count=1
                )
            case 5:
                place = random.randrange(len(line) + 1)
                lines[index] = line[:place] + random.choice("(){}[]:,='\"#%&*!|\t\\@0a") + line[place + 1 :]
            case _:
                other = random.randrange(len(lines))
                lines[index], lines[other] = lines[other], lines[index]
    return "\n".join(lines)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_mutated_configs_have_no_traceback(file: Path) -> None:
    text, refusals, num_imported = file.read_text(encoding="utf-8"), list[str](), 0
    for seed in range(400):
        theirs = Path(file.name)
        theirs.write_text(mutate(text, random.Random(seed)), encoding="utf-8")
        try:
            imported = import_config(theirs, Path("mine.py"))
        except UserError as error:
            refusals.append(f"{error} (seed {seed})")
            continue
        num_imported += 1
        loads_as_reported(imported)
    assert [text for text in refusals if not text.startswith(file.name) or "\n" in text] == []
    assert min(len(refusals), num_imported) > 20
