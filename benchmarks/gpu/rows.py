"""measured.jsonl: a row for every value and for the end of every case, each with all that decided it."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.case import Case, Measurement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "trl",
    "liger-kernel",
    "unsloth",
    "vllm",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
)
END = "end"
"""Name of a case's last row, which says what became of it."""


@dataclass(frozen=True)
class Surroundings:
    """What all rows of one call share."""

    call: str
    """When the script was started, UTC: rows with the same one were measured by one call, on one machine."""
    card: str
    """The GPU's name, or the processor's in a dry run without one."""
    driver: str | None
    versions: Mapping[str, str]
    commit: str | None
    """Of the repository; None where there is no git."""
    code: str
    """Fingerprint of tuner/: with the card, what a value depends on."""
    command: str
    is_dry: bool


def surroundings(*, on_gpu: bool, is_dry: bool) -> Surroundings:
    """Of this machine and this call."""
    card, driver = _card() if on_gpu else (_processor(), None)
    now = datetime.datetime.now(datetime.UTC)
    return Surroundings(
        call=now.isoformat(timespec="seconds"),
        card=card,
        driver=driver,
        versions=_versions(),
        commit=_commit(),
        code=_code(),
        command=" ".join(["benchmarks/gpu/run.py", *sys.argv[1:]]),
        is_dry=is_dry,
    )


class Rows:
    """The file of rows: what it holds already, and what this call adds, line by line as it is measured."""

    def __init__(self, file: Path, here: Surroundings) -> None:
        self._file, self._here = file, here
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.before: list[dict[str, Any]] = [json.loads(line) for line in lines]
        """Rows of earlier calls."""
        self.new: list[dict[str, Any]] = []
        """Rows of this call."""

    def is_done(self, case: str) -> bool:
        """Whether a case has ended on this card, with this code, in a run as dry as this one; well or not."""
        here = (self._here.card, self._here.code, self._here.is_dry)
        return any(
            row["case"] == case and row["name"] == END and (row["card"], row["code"], row["dry"]) == here
            for row in (*self.before, *self.new)
        )

    @property
    def values(self) -> dict[tuple[str, str], float]:
        """Case and name -> value, of this call; of several settings the best."""
        best: dict[tuple[str, str], float] = {}
        for row in self.new:
            if row["name"] != END:
                key = (row["case"], row["name"])
                best[key] = max(row["value"], best.get(key, row["value"]))
        return best

    def add(self, case: Case, measured: Measurement) -> None:
        bound = case.bounds.get(measured.name)
        # small cases are not as large or fast as what they stand for, but as right
        is_judged = not self._here.is_dry or case.name.startswith("right.")
        is_memory = measured.unit == "GiB"
        self._append(
            {
                "case": case.name,
                "name": measured.name,
                "value": measured.value,
                "unit": measured.unit,
                "setting": measured.setting,
                "limit": None if bound is None else str(bound),
                "ok": bound.holds(measured.value) if bound is not None and is_judged else None,
                **(
                    {"measured_gib": measured.value, "predicted_gib": measured.predicted} if is_memory else {}
                ),
            }
        )

    def end(self, case: Case, outcome: str, why: str, seconds: float) -> None:
        """outcome: "measured", "not installed" or "failed", with why in one line."""
        self._append(
            {
                "case": case.name,
                "name": END,
                "outcome": outcome,
                "error": why or None,
                "value": round(seconds, 1),
                "unit": "s",
                "limit": None,
                "ok": None,
            }
        )

    def _append(self, row: dict[str, Any]) -> None:
        here = self._here
        row = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **row,
            "dry": here.is_dry,
            "call": here.call,
            "card": here.card,
            "driver": here.driver,
            "commit": here.commit,
            "code": here.code,
            "command": here.command,
            "versions": dict(here.versions),
        }
        self.new.append(row)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _card() -> tuple[str, str | None]:
    """Name of the first GPU, and its driver's version. Not by torch, which would begin to use the GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return "a GPU of unknown name", None
    name, _, driver = said.splitlines()[0].partition(", ")
    return name, driver


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    """Of python and of those packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None


def _code() -> str:
    digest = hashlib.sha256()
    for file in sorted((ROOT / "tuner").rglob("*.py")):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]
