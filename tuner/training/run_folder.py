"""A run's folder: its config, versions, data, metrics, samples, checkpoints, model and results."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuner.config import StageConfig, from_json, to_json
from tuner.errors import UserError
from tuner.printable import printable
from tuner.training.checkpoint_names import checkpoints_in, step_of
from tuner.training.code_fingerprint import code_fingerprints
from tuner.training.json_lines import (
    append_line,
    finite,
    read_json,
    read_records,
    replace_text,
    to_json_line,
)
from tuner.training.lock import FolderLock
from tuner.training.resume_rules import ROUNDS, changes_that_bind, extension
from tuner.training.versions import versions
from tuner.training.watchers import Sample


class RunFolder:
    """A run folder. Reading it needs nothing; writing it needs its lock, which `start` takes."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._lock = FolderLock(self.folder)
        self._is_new = False
        self._ended_early: dict[str, int] | None = None
        self.extension: list[tuple[str, Any, Any]] = []
        """(path, old, new) of the limits that `start` raised: the run is longer than it was."""

    def __repr__(self) -> str:
        return f"RunFolder({str(self.folder)!r})"

    # What can be read

    @property
    def config(self) -> StageConfig:
        """Raises UserError when the folder is no run's."""
        try:
            return from_json(self._read("config.json"))
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from error

    @property
    def results(self) -> dict[str, Any] | None:
        """The contents of `results.json`; None while the run has not finished."""
        return self.read_json("results")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record per optimizer step, in order; without lines that cannot be read."""
        return read_records(self.folder / "metrics.jsonl")[0]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Answers drawn during training to held-out prompts, or to those of the step where none are held out."""
        return read_records(self.folder / "samples.jsonl")[0]

    @property
    def answers(self) -> dict[int, list[dict[str, Any]]]:
        """Step -> the answers of its rollout that were recorded, in order; empty for a run without rollouts."""
        answers: dict[int, list[dict[str, Any]]] = {}
        for row in read_records(self.folder / "rollouts.jsonl")[0]:
            answers.setdefault(row["step"], []).append(row)
        return answers

    @property
    def has_started(self) -> bool:
        """Whether a step was taken: from then on the folder is bound to its config and its data."""
        return bool(self.metrics) or bool(checkpoints_in(self.checkpoints_folder))

    @property
    def _holds_work(self) -> bool:
        return self.has_started or self.answers_folder.is_dir()

    @property
    def rounds_begun(self) -> int:
        """How many rounds of a run in rounds hold work; 0 for any other run."""
        within = (RunFolder(file.parent) for file in self.folder.glob("round_*/*/config.json"))
        return len({run.folder.parent for run in within if run._holds_work})

    @property
    def is_finished(self) -> bool:
        """Whether it has results and the model that they are of."""
        return self.results is not None and self.model_folder.is_dir()

    @property
    def model_folder(self) -> Path:
        """The trained model, a PEFT or Hugging Face folder; there once the run has finished."""
        return self.folder / "model"

    def milestone_folder(self, name: str) -> Path:
        """The model that was kept under this name of `checkpoint.milestones`."""
        return self.folder / "milestones" / name

    @property
    def checkpoints_folder(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def answers_folder(self) -> Path:
        """Rollouts that an engine with noise of its own has stored, of the steps that may be taken again."""
        return self.folder / "answers"

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The contents of `NAME.json`; None where there is none. Raises UserError where it cannot be read."""
        path = self.folder / f"{name}.json"
        return read_json(path) if path.exists() else None

    # Starting and resuming

    def start(self, config: StageConfig, overrides: Sequence[str] | None, place: dict[str, Any]) -> None:
        """Take the lock; write the identity of a new run, or check that of an old one.

        overrides: from the command line; None: as the run has them.
        place: where it computes, such as {"processes": 2, "threads": 1}. Where it or a version differs from before,
        that is logged: the run resumes, but not bit for bit.
        Raises UserError when another process trains here, or when the config has changed.
        """
        self._make_folder()
        # before anything is compared or written: two processes that start at once would both pass the checks
        self._lock.acquire()
        self.refuse_changes(config)
        self._extend(config)
        # rewritten on resume, too: fields that are free there may have changed
        replace_text(self.folder / "config.json", to_json(config))
        if overrides is not None:
            replace_text(self.folder / "overrides.json", json.dumps(list(overrides), indent=1))
        environment = versions() | place
        self._log_changes(environment)
        self.save_json("versions", environment)
        self._pin_functions(config)

    def pin(self, name: str, fingerprint: str, **details: Any) -> None:
        """Bind the run to what it is made from (`data`, `base`, `functions`), written to `NAME.json`.

        Raises UserError when a run that has started was bound to something else.
        """
        if self.has_started:
            self._refuse_another(name, fingerprint)
        self.save_json(name, {"fingerprint": fingerprint, **details})

    def is_finished_by(self, config: StageConfig) -> bool:
        """Whether it has finished with this config, which asks for no more steps."""
        return self.is_finished and not self.changes(config) and not extension(self.config, config)

    def changes(self, config: StageConfig) -> list[tuple[str, Any, Any]]:
        """(path, old, new) of the leaves in which a config differs from the run's and may not."""
        return changes_that_bind(self.config, config, self.rounds_begun)

    def refuse_changes(self, config: StageConfig) -> None:
        """Raise UserError where the run has started with another config.

        A run in rounds has steps of its own at its end only: until then its rounds that have begun are bound here, and
        the runs in them by themselves.
        """
        is_in_rounds = self.rounds_begun > 0 and (self.folder / "config.json").is_file()
        if not self.has_started and not is_in_rounds:
            return
        changes = [
            f"{path} was {old!r} and is now {new!r}"
            for path, old, new in self.changes(config)
            if self.has_started or path.startswith(ROUNDS)
        ]
        if changes:
            raise UserError(
                f"{self.folder} was begun with another config: {'; '.join(changes)}; "
                "put it back to go on, give the run another name=..., or remove the folder"
            )

    def abandon(self) -> None:
        """Remove a folder that `start` made, unless work would be lost: bad input leaves nothing behind.

        Work is a step, a stored rollout, or any of it in a run within this one, as a run of rounds has.
        """
        if self._is_new and not self._holds_work and not self.rounds_begun:
            shutil.rmtree(self.folder, ignore_errors=True)

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    # Writing while it runs

    def rewind(self, step: int) -> list[str]:
        """Remove the records after `step`, and lines that are none; returns sentences on the latter.

        Records are written at every step, checkpoints are not: a resumed run takes the steps after its checkpoint
        again, and would write a second record of each.
        """
        sentences: list[str] = []
        for name in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl"):
            path = self.folder / name
            if path.is_file():
                records, damaged = read_records(path)
                kept = [record for record in records if record["step"] <= step]
                replace_text(path, "".join(map(to_json_line, kept)))
                if damaged:
                    sentences.append(
                        f"{path}: {damaged} damaged lines are removed; the run itself is as it was"
                    )
        return sentences

    def record(self, record: dict[str, Any]) -> None:
        """Append a step to metrics.jsonl; losses unrounded."""
        append_line(self.folder / "metrics.jsonl", to_json_line(record))

    def record_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Append to samples.jsonl."""
        for sample in samples:
            append_line(self.folder / "samples.jsonl", to_json_line({"step": step, **asdict(sample)}))

    def record_answers(self, step: int, answers: Sequence[dict[str, Any]]) -> None:
        """Append some of a rollout's answers to rollouts.jsonl."""
        for answer in answers:
            append_line(self.folder / "rollouts.jsonl", to_json_line({"step": step, **answer}))

    def log(self, text: str) -> None:
        """Append a line to log.txt, with the time."""
        append_line(self.folder / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}\n")

    def save_json(self, name: str, value: dict[str, Any]) -> None:
        """Write `NAME.json`; numbers that are not finite become null."""
        replace_text(self.folder / f"{name}.json", json.dumps(finite(value), indent=1))

    def finish(self, results: dict[str, Any]) -> None:
        """Write results.json, which marks the run as finished."""
        early = {} if self._ended_early is None else {"ended_early": self._ended_early}
        self.save_json("results", {**results, **early})
        self.withdraw_end()

    # Ending early

    @property
    def is_training(self) -> bool:
        """Whether another process trains here now."""
        return self._lock.is_held

    @property
    def end_requested(self) -> bool:
        """Whether the run is to end after its running step."""
        return self._end_request.exists()

    def request_end(self) -> None:
        """Have the run end after its running step, or where it is resumed after its last checkpoint."""
        replace_text(self._end_request, "")

    def withdraw_end(self) -> None:
        self._end_request.unlink(missing_ok=True)

    def end_early(self, step: int, total_steps: int) -> str:
        """Note for results.json that the run ends so; returns a sentence on an end that the user asked for."""
        self._ended_early = {"step": step, "of": total_steps}
        return (
            f"ended early as requested, after step {step:,} of {total_steps:,}: this is the run's model; a larger "
            "max_steps goes on from here"
        )

    @property
    def _end_request(self) -> Path:
        return self.folder / ".end"

    def _make_folder(self) -> None:
        self._is_new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder}: this folder cannot be made ({error.strerror}); choose another with --runs"
            ) from error

    def _extend(self, config: StageConfig) -> None:
        """Set the results aside where the config makes the run longer: they are not those of the whole run."""
        self.extension = extension(self.config, config) if self.has_started else []
        if not self.extension:
            return
        self.withdraw_end()
        steps = [step_of(path) for path in checkpoints_in(self.checkpoints_folder)]
        if (results := self.folder / "results.json").is_file():
            results.rename(self.folder / f"results_{max(steps, default=0):06d}.json")

    def _refuse_another(self, name: str, fingerprint: str) -> None:
        saved = self.read_json(name)
        if saved is None:
            self.log(f"{name}.json is gone: the run is bound to the {name} that is here now")
            return
        pinned = str(saved.get("fingerprint", "without a fingerprint"))
        if pinned != fingerprint:
            raise UserError(
                f"{self.folder}: the {name} changed since this run began (was {pinned[:12]}, is {fingerprint[:12]}); "
                "put the old back, or start another run with name=..."
            )

    def _log_changes(self, environment: dict[str, Any]) -> None:
        """Log what differs from the environment that the run was in before."""
        before = self.read_json("versions") or environment
        for name, value in environment.items():
            if before.get(name) != value:
                self.log(
                    f"{name} was {before.get(name)} and is now {value}: going on, perhaps not bit for bit"
                )

    def _pin_functions(self, config: StageConfig) -> None:
        """Copy the files that hold the config's own functions, and refuse to resume with other code."""
        fingerprints = code_fingerprints(config)
        if not fingerprints:
            return
        fingerprint = hashlib.sha256("".join(fingerprints.values()).encode()).hexdigest()
        copies = {str(file): f"code/{file.stem}_{digest[:8]}.py" for file, digest in fingerprints.items()}
        self.pin("functions", fingerprint, copies=copies)
        (self.folder / "code").mkdir(exist_ok=True)
        for file, copy in copies.items():
            shutil.copy2(file, self.folder / copy)

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"not a run folder, it has no {name}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name} cannot be read ({error}); restore it") from error
