"""Watchers follow a run and never change it: progress lines, notebooks, trackers."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tuner.config.stage_config import StageConfig
from tuner.errors import UserError
from tuner.printable import echo

Outcome = Literal["finished", "interrupted", "failed"]
Record = dict[str, float | int | None]
"""One line of metrics.jsonl: numbers by name, for one optimizer step; `loss` is None when it was skipped."""

Tables = dict[str, tuple[list[str], list[list[Any]]]]
"""Name -> columns and rows of plain values."""


@dataclass(frozen=True)
class Sample:
    """A sampled answer, and the one in the data.

    The prompt is a held-out one; in reinforcement learning without held-out prompts, one of the step's.
    """

    prompt: str
    answer: str
    reference: str
    score: float | None
    """In 0..1; None when the config names no score."""
    condition: str | None = None
    """The condition a reward model scores the answer under, where it has one."""


class Watcher(Protocol):
    """Is called during a run, in this order: begin; step, samples and message; perhaps report; end."""

    def begin(self, run_folder: Path, config: StageConfig, first_step: int, total_steps: int) -> None:
        """Training is about to start after `first_step` earlier steps: 0, or more where a run is resumed."""
        ...

    def step(self, record: Record) -> None:
        """An optimizer step is over."""
        ...

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Answers were sampled after this many steps."""
        ...

    def message(self, text: str) -> None:
        """A warning or a fact, as a sentence."""
        ...

    def report(self, tables: Tables) -> None:
        """The trained model was measured: its tables."""
        ...

    def end(self, outcome: Outcome) -> None:
        """Training is over; always called after begin, also when training failed."""
        ...


class Watchers:
    """Several watchers as one. One that raises is reported and dropped; training goes on.

    The exception is a UserError in `begin`: nothing has been spent yet, and the user can correct it.
    """

    def __init__(self, watchers: Iterable[Watcher] = ()) -> None:
        self._watchers = list(watchers)

    def begin(self, run_folder: Path, config: StageConfig, first_step: int, total_steps: int) -> None:
        begun: list[Watcher] = []
        # a copy: _drop removes from the list meanwhile
        for watcher in list(self._watchers):
            try:
                watcher.begin(run_folder, config, first_step, total_steps)
                begun.append(watcher)
            except UserError:
                self._watchers = begun  # the others have not begun
                self.end("failed")  # restores the terminal
                self._watchers = []
                raise
            except Exception as error:
                self._drop(watcher, "begin", error)

    def step(self, record: Record) -> None:
        self._notify("step", record)

    def samples(self, step: int, samples: list[Sample]) -> None:
        self._notify("samples", step, samples)

    def message(self, text: str) -> None:
        self._notify("message", text)

    def report(self, tables: Tables) -> None:
        self._notify("report", tables)

    def end(self, outcome: Outcome) -> None:
        """In reverse order, so that the display, which began first, can show the messages of the others."""
        self._watchers.reverse()
        self._notify("end", outcome)
        self._watchers.reverse()

    def _notify(self, method: str, *arguments: Any) -> None:
        for watcher in list(self._watchers):
            try:
                getattr(watcher, method)(*arguments)
            except Exception as error:
                self._drop(watcher, method, error)

    def _drop(self, watcher: Watcher, method: str, error: Exception) -> None:
        if watcher not in self._watchers:  # it failed again while another failure was being reported
            return
        self._watchers.remove(watcher)
        text = (
            f"{type(watcher).__name__} failed in {method} ({type(error).__name__}: {error}) "
            "and is dropped; training goes on"
        )
        if self._watchers:
            self.message(text)
        else:
            with suppress(OSError):  # of a terminal that was closed
                echo(text, sys.stderr)  # a warning must reach someone
