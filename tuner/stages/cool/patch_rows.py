"""The rows of a patch: labels, those held out by pattern, and original preferences drawn beside them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.config import Patch, RewardModel, Source
from tuner.data.draw_rows import draw_rows
from tuner.models.atomic_folder import write_atomically
from tuner.stages.cool.contradiction import Contradictions, rejected_patterns
from tuner.stages.cool.labels import LabeledPairs
from tuner.training.json_lines import read_json, replace_text

LABELS, CONTENTS = "labels.jsonl", "rows.json"


@dataclass(frozen=True)
class PatchRows:
    """The files of a patch, as sources of a reward model's config."""

    train: Sequence[Source]
    """The labels, and the original rows."""
    test: Mapping[str, str]
    """Pattern -> file of its labels that are held out."""
    labels: int
    """Labels that are trained on."""
    original: int
    """Original rows that are trained on."""
    left_out: int
    """Pairs without a usable label when the rows were written."""
    contradicting: Mapping[str, int]
    """Pattern that the labels reject -> original rows that prefer it, which were not drawn from."""


def write_patch_rows(
    labels: LabeledPairs, reward: RewardModel, patch: Patch, folder: Path, seed: int
) -> PatchRows:
    """Write the rows of a patch to a folder, in place of what is there."""
    train, test = labels.split(patch.held_out)
    by_pattern: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in test:
        by_pattern[row["pattern"]].append(row)
    contradictions = Contradictions(rejected_patterns(train) if patch.contradicting == "leave_out" else [])
    count = round(patch.original * len(train))
    drawn = draw_rows(reward.data.sources, count, seed, contradictions.agrees)
    originals = {f"original_{number}.jsonl": part for number, part in enumerate(drawn) if part.rows}
    held_out = {
        f"held_out_{number}_{_slug(pattern)}.jsonl": pattern for number, pattern in enumerate(by_pattern)
    }
    settings = {file: _settings(part.source) for file, part in originals.items()}

    def write(unfinished: Path) -> None:
        _write(unfinished / LABELS, train)
        for file, part in originals.items():
            _write(unfinished / file, (dict(row.values) for row in part.rows))
        for file, pattern in held_out.items():
            _write(unfinished / file, by_pattern[pattern])
        contents = {
            "train": {LABELS: {"weight": patch.weight}, **settings},
            "test": held_out,
            "labels": len(train),
            "original": sum(len(part.rows) for part in drawn),
            "left_out": labels.left_out,
            "contradicting": contradictions.counts,
        }
        replace_text(unfinished / CONTENTS, json.dumps(contents, indent=1, ensure_ascii=False))

    write_atomically(folder, write)
    return read_patch_rows(folder)


def read_patch_rows(folder: Path) -> PatchRows:
    """The rows of a patch that were written to a folder. Raises UserError where they are gone."""
    contents = read_json(folder / CONTENTS)
    return PatchRows(
        train=[Source(path=str(folder / file), **settings) for file, settings in contents["train"].items()],
        test={pattern: str(folder / file) for file, pattern in contents["test"].items()},
        labels=contents["labels"],
        original=contents["original"],
        left_out=contents["left_out"],
        contradicting=contents.get("contradicting", {}),
    )


def _settings(source: Source) -> dict[str, Any]:
    """Fields of a source that its drawn rows are read with."""
    return {name: getattr(source, name) for name in ("shape", "weight", "condition")}


def _write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as output:
        for row in rows:
            output.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")[:40] or "pattern"
