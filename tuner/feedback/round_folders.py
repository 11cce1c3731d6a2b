"""Where candidates and their labels are, and what they hold: a file with its labels beside it, or a run's rounds."""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuner.config.feedback_config import People
from tuner.errors import UserError
from tuner.feedback.agreement import report
from tuner.feedback.candidates import Candidate, read_candidates
from tuner.feedback.preferences import preference_rows
from tuner.feedback.store import Label, LabelStore
from tuner.training.json_lines import read_json

_CANDIDATES = Path("candidates", "candidates.jsonl")
_LABELS = Path("feedback", "labels.sqlite")
_ROUND = re.compile(r"round_(\d+)")


@dataclass(frozen=True, slots=True)
class LabelFiles:
    """A set of candidates, and the store of their labels."""

    candidates: Path
    store: Path
    round: int | None = None
    """Number of the round; None for a file that belongs to none."""

    def read(self) -> tuple[dict[str, Candidate], list[Label]]:
        """The candidates and their labels; none where nobody has labeled yet."""
        candidates = read_candidates(self.candidates)
        if not self.store.exists():
            return candidates, []
        with closing(LabelStore(self.store)) as store:
            store.add(candidates.values())
            return candidates, store.labels()

    def figures(self) -> dict[str, Any]:
        """What the labels are worth: how many candidates they decide, and agreement (see `agreement.report`)."""
        candidates, labels = self.read()
        rows, left_out = preference_rows(labels, candidates)
        number = {} if self.round is None else {"round": self.round}
        counts = {"candidates": len(candidates), "preferences": len(rows), "left_out": dict(left_out)}
        return {**number, **counts, **report(labels, candidates)}


def round_folder(run: Path, number: int) -> Path:
    """The folder of a round, counted from 1."""
    return run / f"round_{number}"


def round_files(run: Path, number: int) -> LabelFiles:
    """The candidates of a round, and the store of their labels."""
    folder = round_folder(run, number)
    return LabelFiles(folder / _CANDIDATES, folder / _LABELS, number)


def label_files(target: Path) -> list[LabelFiles]:
    """The candidates of a file, of a round (runs/NAME/round_2), or of all rounds of a run, in order.

    Rounds without a pair (their policies gave the same answers) are left out of a run. Raises UserError for a folder
    without candidates.
    """
    if not target.is_dir():
        return [LabelFiles(target, target.with_name("labels.sqlite"))]
    folders = list(target.iterdir()) if is_run(target) else [target]
    files = [
        LabelFiles(folder / _CANDIDATES, folder / _LABELS, _number(folder))
        for folder in folders
        if _number(folder) is not None and (folder / _CANDIDATES).is_file()
    ]
    if is_run(target):
        files = [file for file in files if file.candidates.stat().st_size > 0]
    if not files:
        raise UserError(
            f"{target}: no round with candidates (round_1/{_CANDIDATES}); name a JSONL file of candidates, or a run of "
            "several rounds whose first round has trained its policy"
        )
    return sorted(files, key=lambda files: files.round or 0)


def is_run(target: Path) -> bool:
    """Whether a target is a run of several rounds, and not a round or a file."""
    return target.is_dir() and _number(target) is None


def people_of(target: Path) -> People:
    """How the run that a target belongs to wants people to label; the defaults for one that says nothing of them."""
    config = (target if is_run(target) else target.resolve().parent) / "config.json"
    if not target.is_dir() or not config.is_file():
        return People()
    feedback = read_json(config).get("feedback")
    entries = feedback if isinstance(feedback, list) else []
    for entry in entries:
        if isinstance(entry, dict) and entry.get("kind") == "people":
            try:
                return People.model_validate_json(json.dumps(entry))
            except ValidationError as error:
                raise UserError(
                    f"{config}: its feedback by people cannot be read ({error.errors()[0]['msg']}); restore it"
                ) from error
    return People()


def _number(folder: Path) -> int | None:
    match = _ROUND.fullmatch(folder.resolve().name)
    return int(match[1]) if match else None
