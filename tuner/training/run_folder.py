"""A run is a folder that can be believed: config, versions, data, metrics, samples, checkpoints, model, results."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tuner.config import StageConfig, differences, from_json, to_json
from tuner.config.base import ConfigBase
from tuner.errors import UserError
from tuner.training.watchers import Sample

FREE_ON_RESUME = (
    "tracking",
    "checkpoint.",
    "data.cache",
    "prompts.cache",
    "replay.cache",
    "tokens_per_pass",
    "sampling.cache_gib",
    "gradient_checkpointing",
    "device",
)
"""Config paths that may differ when a run goes on: they change nothing that is learned (the last four: but for
rounding), and who ran out of memory needs them."""
PACKAGES = (
    "tuner",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "datasets",
    "trl",
    "tokenizers",
)


class Run:
    """A run folder. Reading it needs nothing; writing it needs its lock, which `start` takes."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._lock: IO[str] | None = None
        self._is_new = False

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    # What can be read

    @property
    def config(self) -> StageConfig:
        return from_json(self._read("config.json"))

    @property
    def results(self) -> dict[str, Any] | None:
        """What `results.json` says; None while the run has not finished."""
        return json.loads(self._read("results.json")) if (self.folder / "results.json").is_file() else None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record per optimiser step, in order."""
        return self._records("metrics.jsonl")

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Answers drawn during training, to held-out prompts; in PPO without any, to those of the step."""
        return self._records("samples.jsonl")

    @property
    def begun(self) -> bool:
        """Whether a step was taken here: from then on the folder is bound to its config and its data."""
        return bool(self.metrics) or any(self.checkpoints_folder.glob("step_*"))

    @property
    def model_folder(self) -> Path:
        """The trained model, a PEFT or Hugging Face folder; there once the run has finished."""
        return self.folder / "model"

    @property
    def checkpoints_folder(self) -> Path:
        return self.folder / "checkpoints"

    # Starting and going on

    def start(self, config: StageConfig, overrides: Sequence[str], place: dict[str, Any]) -> None:
        """Take the lock; write the identity of a new run, or check that of an old one.

        place: where it computes, such as {"processes": 2, "threads": 1}. What differs from before, of it or of
        versions, is logged: the run goes on, but not bit for bit.
        Raises UserError when another process trains here, or when the config has changed.
        """
        self._make_folder()
        self._take_lock()
        if self.begun:
            self._refuse_changes(config)
        self._write("config.json", to_json(config))
        self._write("overrides.json", json.dumps(list(overrides), indent=1))
        self._log_moves(now := versions() | place)
        self._write("versions.json", json.dumps(now, indent=1))
        self._keep_functions(config)

    def check_same(self, what: str, fingerprint: str, **facts: Any) -> None:
        """Write what the run is made from (`data`, `base`, `functions`), or refuse to go on with something else."""
        known = (self.kept(what) or {}).get("fingerprint", fingerprint) if self.begun else fingerprint
        if known != fingerprint:
            raise UserError(
                f"{self.folder}: the {what} changed since this run began (was {known[:12]}, is {fingerprint[:12]}); "
                "put the old back, or start another run with name=..."
            )
        self.keep(what, {"fingerprint": fingerprint, **facts})

    def changes(self, config: StageConfig) -> list[tuple[str, Any, Any]]:
        """(path, old, new) of the leaves in which a config differs from the run's and may not."""
        found = differences(self.config, config)
        return [change for change in found if not change[0].startswith(FREE_ON_RESUME)]

    def abandon(self) -> None:
        """Remove a folder that `start` made if no step was taken in it: bad input leaves nothing behind."""
        if self._is_new and not self.begun:
            shutil.rmtree(self.folder, ignore_errors=True)

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # Writing while it runs

    def rewind(self, step: int) -> None:
        """Forget the records after `step`, so that going on repeats none."""
        for name in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl"):
            if (self.folder / name).is_file():
                kept = [_line(record) for record in self._records(name) if record["step"] <= step]
                self._write(name, "".join(kept))

    def record(self, record: dict[str, Any]) -> None:
        """Append a step to metrics.jsonl; losses unrounded."""
        self._append("metrics.jsonl", _line(record))

    def record_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self._append("samples.jsonl", _line({"step": step, **asdict(sample)}))

    def record_answers(self, step: int, answers: Sequence[dict[str, Any]]) -> None:
        """Some of a rollout's answers, in rollouts.jsonl."""
        for answer in answers:
            self._append("rollouts.jsonl", _line({"step": step, **answer}))

    def log(self, text: str) -> None:
        """A line in log.txt, with the time."""
        self._append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def keep(self, name: str, value: dict[str, Any]) -> None:
        """A measure taken on the way, as `NAME.json`."""
        self._write(f"{name}.json", json.dumps(finite(value), indent=1))

    def kept(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finish(self, results: dict[str, Any]) -> None:
        """Write results.json, which says that the run is over."""
        self._write("results.json", json.dumps(finite(results), indent=1))

    def _make_folder(self) -> None:
        self._is_new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder}: this folder cannot be made ({error.strerror}); choose another with --runs"
            ) from error

    def _take_lock(self) -> None:
        lock = (self.folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{self.folder}: process {lock.read().strip() or 'unknown'} is training here; "
                "wait for it, or give this run another name=..."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock

    def _refuse_changes(self, config: StageConfig) -> None:
        changes = [f"{path} was {old!r} and is now {new!r}" for path, old, new in self.changes(config)]
        if changes:
            raise UserError(
                f"{self.folder} was begun with another config: {'; '.join(changes)}; "
                "put it back to go on, give the run another name=..., or remove the folder"
            )

    def _log_moves(self, now: dict[str, Any]) -> None:
        before = self.kept("versions") or now
        for name in now:
            if before.get(name) != now[name]:
                self.log(
                    f"{name} was {before.get(name)} and is now {now[name]}: going on, perhaps not bit for bit"
                )

    def _keep_functions(self, config: StageConfig) -> None:
        """Copy the files that hold the config's own functions, and refuse to go on with other code."""
        files = sorted({Path(reference.rpartition(":")[0]) for reference in functions_of(config)})
        digests = {file: _hash_of_code(file) for file in files if file.is_file()}
        if not digests:
            return
        together = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
        copies = {str(file): f"code/{file.stem}_{digest[:8]}.py" for file, digest in digests.items()}
        self.check_same("functions", together, copies=copies)
        (self.folder / "code").mkdir(exist_ok=True)
        for file, copy in copies.items():
            shutil.copy2(file, self.folder / copy)

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{self.folder}: not a run folder, it has no {name}") from None

    def _write(self, name: str, text: str) -> None:
        unfinished = self.folder / f".writing-{name}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.folder / name)

    def _append(self, name: str, line: str) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(line)

    def _records(self, name: str) -> list[dict[str, Any]]:
        """The records of a .jsonl file; a last line that a kill left half-written is no record."""
        path = self.folder / name
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        return [json.loads(line) for line in lines[:-1]]  # not splitlines: texts hold other line separators


def _hash_of_code(file: Path) -> str:
    """Of what a file does: comments and layout aside, and the config that may stand in it, which is compared itself."""
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file}: {type(error).__name__}: {error}; correct this file") from error
    tree.body = [one for one in tree.body if not _sets_config(one)]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def _sets_config(statement: ast.stmt) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == "config" for target in targets)


def finite(value: Any) -> Any:
    """The value; None for a number, also within, that JSON has no word for."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict[str, Any]) -> str:
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def functions_of(config: ConfigBase) -> list[str]:
    """The "file.py:name" references of a config, or of a part of it."""
    found: list[str] = []

    def visit(value: Any) -> None:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)
        elif isinstance(value, str) and value.rpartition(":")[0].endswith(".py"):
            found.append(value)

    visit(config.model_dump(mode="json"))
    return list(dict.fromkeys(found))


def versions() -> dict[str, str | None]:
    """Versions of what decides a run's numbers, and the commit of the working directory."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"commit": _commit()}


def _commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
