"""What looks on while a run trains, and never changes it: progress, trackers, notebooks, logs."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tuner.config.stage_config import StageConfig
from tuner.errors import UserError

Outcome = Literal["finished", "interrupted", "failed"]
Record = dict[str, float | int | None]
"""One line of metrics.jsonl: numbers by name, for one optimiser step; `loss` is None when it was skipped."""


Tables = dict[str, tuple[list[str], list[list[Any]]]]
"""Name -> columns and rows of plain values."""


@dataclass(frozen=True)
class Sample:
    """An answer to a held-out prompt, or in PPO without any to one of the step's, beside the one in the data."""

    prompt: str
    answer: str
    reference: str
    score: float | None
    """In 0..1; None when the config names no score."""
    condition: str | None = None
    """Under which the answer is judged, where a reward model judges it."""


class Watcher(Protocol):
    """Is told what happens, in this order: begin, then step, samples and message, perhaps report, then end."""

    def begin(self, run_folder: Path, config: StageConfig, first_step: int, total_steps: int) -> None:
        """Training is about to start, after `first_step` steps taken before: 0, or more when it goes on."""
        ...

    def step(self, record: Record) -> None:
        """An optimiser step is over."""
        ...

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Answers were drawn after this many steps."""
        ...

    def message(self, text: str) -> None:
        """A warning or a fact, in words."""
        ...

    def report(self, tables: Tables) -> None:
        """What was found out about the trained model."""
        ...

    def end(self, outcome: Outcome) -> None:
        """Training is over. Always comes after begin, also when training failed."""
        ...


class Watchers:
    """Several watchers as one. One that raises is reported in words and dropped; training goes on.

    The exception is a UserError in `begin`: nothing has been spent yet, and the user can mend it.
    """

    def __init__(self, watchers: Iterable[Watcher] = ()) -> None:
        self._watchers = list(watchers)

    def begin(self, run_folder: Path, config: StageConfig, first_step: int, total_steps: int) -> None:
        begun: list[Watcher] = []
        for watcher in list(self._watchers):
            try:
                watcher.begin(run_folder, config, first_step, total_steps)
                begun.append(watcher)
            except UserError:
                self._watchers = begun  # the others have nothing to end
                self.end("failed")  # restores the terminal
                self._watchers = []
                raise
            except Exception as error:
                self._drop(watcher, "begin", error)

    def step(self, record: Record) -> None:
        self._tell("step", record)

    def samples(self, step: int, samples: list[Sample]) -> None:
        self._tell("samples", step, samples)

    def message(self, text: str) -> None:
        self._tell("message", text)

    def report(self, tables: Tables) -> None:
        self._tell("report", tables)

    def end(self, outcome: Outcome) -> None:
        """Tell the last one first, so that the display, which began first, can show what the others say."""
        self._watchers.reverse()
        self._tell("end", outcome)
        self._watchers.reverse()

    def _tell(self, verb: str, *arguments: Any) -> None:
        for watcher in list(self._watchers):
            try:
                getattr(watcher, verb)(*arguments)
            except Exception as error:
                self._drop(watcher, verb, error)

    def _drop(self, watcher: Watcher, verb: str, error: Exception) -> None:
        if watcher not in self._watchers:  # it failed again while another failure was being reported
            return
        self._watchers.remove(watcher)
        text = (
            f"{type(watcher).__name__} failed in {verb} ({type(error).__name__}: {error}) "
            "and no longer looks on; training goes on"
        )
        if self._watchers:
            self.message(text)
        else:
            print(text, file=sys.stderr, flush=True)  # a warning must reach someone
