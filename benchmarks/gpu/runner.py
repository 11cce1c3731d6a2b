"""Which cases fit the time that is left, and what becomes of them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.case import Case, Measurement, Place
from benchmarks.gpu.child import Ended, follow, fork, measure_into, works_in_a_fork
from benchmarks.gpu.rows import END, Rows
from benchmarks.gpu.shapes import seconds_to_make

LIMIT = 2.0
"""A case is stopped after so many times its estimate, and MARGIN."""
MARGIN = 60
"""Seconds."""
DRY_LIMIT = 300
"""Seconds of a case in small, on a machine that may be busy."""
RESERVE = 5
"""Seconds of the call that no case gets: to end the last one and write its row."""
SCRIPT = Path(__file__).with_name("run.py")


@dataclass
class Runner:
    """Runs cases one after another until the time is up."""

    cases: Mapping[str, Case]
    """All of them by name, in the order in which they run."""
    rows: Rows
    place: Place
    logs: Path
    """Folder for what each case prints."""
    deadline: float
    """By time.monotonic()."""
    forks: bool = True
    """Whether a case is a fork of this process, rather than an interpreter of its own."""

    def run(self, names: Sequence[str], *, again: bool = False) -> list[str]:
        """Run cases by name; returns those for which too little time was left. again: also those that are done."""
        left = []
        for name in names:
            if self._is_measured(name) or (self.rows.is_done(name) and not again):
                continue
            chain = [
                self.cases[beside] for beside in self.cases[name].beside if not self._is_measured(beside)
            ]
            chain.append(self.cases[name])
            if self._estimate(chain) > self.deadline - time.monotonic() - RESERVE:
                left.append(name)
                continue
            for case in chain:
                self._run(case)
        return left

    def _is_measured(self, name: str) -> bool:
        """Whether a case has ended in this call."""
        return any(row["case"] == name and row["name"] == END for row in self.rows.new)

    def _estimate(self, chain: Sequence[Case]) -> float:
        if self.place.is_dry:
            return 0.0
        shapes = dict.fromkeys(shape for case in chain for shape in case.shapes)
        making = sum(seconds_to_make(shape, self.place.models) for shape in shapes)
        return making + sum(case.seconds for case in chain)

    def _run(self, case: Case) -> None:
        started = time.monotonic()
        missing = [module for module in (*case.needs, *case.first) if not _can_be_imported(module)]
        if missing:
            ended = Ended("not installed", f"{', '.join(missing)} cannot be imported")
        else:
            limit = DRY_LIMIT if self.place.is_dry else LIMIT * self._estimate([case]) + MARGIN
            ended = self._in_child(case, min(limit, self.deadline - started - RESERVE))
        self.rows.end(case, ended.outcome, ended.why, time.monotonic() - started)
        _show(case, self.rows)

    def _in_child(self, case: Case, seconds: float) -> Ended:
        work = Path(tempfile.mkdtemp(prefix=f"{case.name}-"))
        place = replace(self.place, work=work, earlier=self.rows.values)
        spool, log = work / "measured.jsonl", self.logs / f"{case.name}.txt"
        try:
            log.unlink(missing_ok=True)
            is_fork = self.forks and not case.first
            job = partial(measure_into, spool, case, place) if is_fork else partial(_become, case, place)
            child = fork(job, log)
            return follow(child, spool, seconds, partial(self._add, case))
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _add(self, case: Case, measured: Measurement) -> None:
        self.rows.add(case, measured)


def preload(device: torch.device) -> None:
    """Import what cases import, once for all of them; on a GPU without what touches it when it is imported."""
    modules = ["tuner.stages.sft.loop", "tuner.stages.reward.loop", "tuner.stages.rl.loop", "datasets"]
    if device.type == "cpu":
        modules += ["peft", "trl"]  # with which comes bitsandbytes, which asks the GPU what it is
    for module in modules:
        with suppress(ImportError):  # the cases that need it say so
            importlib.import_module(module)


def how_to_start(device: torch.device, log: Path) -> bool | None:
    """Whether cases can be forks of this process; None where there is no such device."""
    if device.type == "cpu" or works_in_a_fork(device, log):
        return True
    script = f"import torch; torch.zeros(1, device={str(device)!r}).item()"
    return (
        False if subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0 else None
    )


def _become(case: Case, place: Place) -> None:
    """In a child: become an interpreter that measures a case."""
    earlier = [[*names, value] for names, value in place.earlier.items()]
    values = {
        "case": case.name,
        "first": case.first,
        "device": str(place.device),
        "dry": place.is_dry,
        "models": str(place.models),
        "work": str(place.work),
        "earlier": earlier,
    }
    os.execv(sys.executable, [sys.executable, str(SCRIPT), "--child", json.dumps(values)])


def _can_be_imported(module: str) -> bool:
    """Whether a module is there; it is not imported, as it could touch the GPU."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False


def _show(case: Case, rows: Rows) -> None:
    """Print what a case has measured, a line for each value."""
    for row in (row for row in rows.new if row["case"] == case.name):
        if row["name"] == END:
            why = f": {row['error']}" if row["error"] else ""
            print(f"{case.name:<34} {row['outcome']} in {row['value']:.0f} s{why}", flush=True)
            continue
        verdict = {True: "  yes", False: "  NO", None: ""}[row["ok"]]
        limit = "" if row["limit"] is None else f"  {row['limit']}{verdict}"
        predicted = "" if row.get("predicted_gib") is None else f"  (predicted {row['predicted_gib']:.2f})"
        name = f"{row['name']} ({row['setting']})" if row["setting"] else row["name"]
        print(f"    {name:<50} {row['value']:>12.5g} {row['unit']}{predicted}{limit}", flush=True)
