"""Progress in a shell: a live bar on a terminal, plain lines where there is none.

Both go to stderr, so that stdout carries a command's results only. rich is imported only for a terminal.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tuner.config.stage_config import StageConfig
from tuner.display.bars import Bar, CountingBar
from tuner.display.durations import duration
from tuner.display.lines import CountingLines, Lines
from tuner.display.run_facts import Fact, RunFacts
from tuner.printable import echo
from tuner.training.figures import StageFigures
from tuner.training.watchers import Outcome, Record, Sample, Tables


def on_terminal(stream: TextIO) -> bool:
    """Whether a live display can be drawn on this stream."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class ProgressWatcher:
    """Shows a run in a shell."""

    def __init__(
        self,
        figures: StageFigures,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._figures = figures
        self._stream = stream or sys.stderr
        self._clock = clock
        self._display: Bar | Lines | None = None

    def begin(self, run_folder: Path, config: StageConfig, first_step: int, total_steps: int) -> None:
        self._folder = run_folder
        self._before = first_step  # steps that an earlier process took
        self._total = total_steps
        self._last_step = self._before
        self._run_facts = RunFacts(self._figures, total_steps)
        self._started = self._clock()
        self._display = (Bar if on_terminal(self._stream) else Lines)(
            self._stream, config.name or run_folder.name, self._before, total_steps, self._clock
        )
        if self._before:
            self.message(f"resumed after step {self._before:,} of {total_steps:,}")

    def step(self, record: Record) -> None:
        if self._display is None:
            return
        self._run_facts.add(record)
        self._last_step = int(record["step"] or 0)
        evaluated = any(name.startswith("eval_") for name in record)
        self._display.step(self._last_step, self._facts, important=evaluated)

    def samples(self, step: int, samples: list[Sample]) -> None:
        if self._display is None:
            return
        for number, sample in enumerate(samples, start=1):
            self._display.sample(f"step {step:,}, sample {number} of {len(samples)}", sample)

    def report(self, tables: Tables) -> None:
        """Nothing: the command prints it."""

    def message(self, text: str) -> None:
        """Shown before begin and after end too: a warning must reach someone."""
        if self._display is not None:
            self._display.message(text)
        else:
            echo(text, self._stream)

    def end(self, outcome: Outcome) -> None:
        if self._display is not None:
            self._display.end(
                self._last_step, self._facts, self._summary(outcome), good=outcome == "finished"
            )
            self._display = None

    def _facts(self) -> list[Fact]:
        left = self._time_left()
        return [*self._run_facts.line(), *([Fact(left, "time left")] if left else [])]

    def _time_left(self) -> str:
        """By this process's wall clock, so that evaluating and saving count."""
        done = self._last_step - self._before
        if done <= 0 or self._last_step >= self._total:
            return ""
        # Over this process's steps only: a resumed run's earlier ones took none of this time.
        seconds = (self._clock() - self._started) / done * (self._total - self._last_step)
        return f"{duration(seconds)} left"

    def _summary(self, outcome: Outcome) -> str:
        seconds = self._clock() - self._started
        ending = f"{outcome} after step {self._last_step:,} of {self._total:,} in {duration(seconds)}"
        return " · ".join([ending, *self._run_facts.summary(), str(self._folder)])


@contextmanager
def progress_bar(
    description: str, total: int | None, stream: TextIO | None = None
) -> Iterator[Callable[[int], None]]:
    """A bar, or plain lines, around work of `total` items (None: unknown); yields a function that takes counts.

    with progress_bar("Tokenizing", total=len(rows)) as advance:
        for part in parts:
            advance(len(part))
    """
    out = stream or sys.stderr
    counter = (CountingBar if on_terminal(out) else CountingLines)(out, description, total)
    try:
        yield counter.advance
    except BaseException:
        counter.stop()  # the caller reports what went wrong
        raise
    counter.close()


@contextmanager
def reading_bar() -> Iterator[Callable[[int], None]]:
    """A bar for rows read from one set after another; yields a function that takes the rows read so far."""
    with progress_bar("Reading rows", None) as advance:
        done = 0

        def progress(rows: int) -> None:
            nonlocal done
            advance(rows - done if rows >= done else rows)  # a smaller number begins another set
            done = rows

        yield progress
