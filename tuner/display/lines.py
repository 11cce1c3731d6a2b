"""Progress where there is no terminal: whole lines without control codes, each flushed at once."""

import time
from collections.abc import Callable
from typing import TextIO

from tuner.display.durations import duration
from tuner.display.run_facts import Fact
from tuner.display.sample_text import sample_lines
from tuner.printable import echo
from tuner.training.watchers import Sample

LINES_PER_RUN = 20
"""Progress lines of a run, at equal distances ..."""
SECONDS_AT_LEAST = 2.0
"""... but none sooner than this after the line before ..."""
SECONDS_AT_MOST = 60.0
"""... and none later than this."""


class Lines:
    """A run's progress in lines."""

    def __init__(
        self, stream: TextIO, name: str, before: int, total: int, clock: Callable[[], float]
    ) -> None:
        self._stream = stream
        self._total = total
        self._clock = clock
        self._last_line: tuple[float, int] | None = None  # time and step of the line before

    def step(self, step: int, facts: Callable[[], list[Fact]], important: bool) -> None:
        """facts: called only where a line is due."""
        if important or self._due(step):
            self._write_step(step, facts())

    def sample(self, title: str, sample: Sample) -> None:
        score = "" if sample.score is None else f", score {sample.score:.2f}"
        self._write(f"{title}{score}")
        for name, text in sample_lines(sample):
            self._write(f"  {name + ':':<10} " + text.replace("\n", "\n" + " " * 13))

    def message(self, text: str) -> None:
        self._write(text)

    def end(self, step: int, facts: Callable[[], list[Fact]], summary: str, good: bool) -> None:
        if self._last_line is not None and self._last_line[1] != step:
            self._write_step(step, facts())
        self._write(summary)

    def _due(self, step: int) -> bool:
        if self._last_line is None or step >= self._total:
            return True
        seconds = self._clock() - self._last_line[0]
        steps = step - self._last_line[1]
        return seconds >= SECONDS_AT_MOST or (
            seconds >= SECONDS_AT_LEAST and steps * LINES_PER_RUN >= self._total
        )

    def _write_step(self, step: int, facts: list[Fact]) -> None:
        self._last_line = (self._clock(), step)
        width = len(f"{self._total:,}")
        share = step / self._total if self._total else 1
        texts = (fact.text for fact in facts)
        self._write("  ".join([f"step {step:>{width},}/{self._total:,}", f"{share:4.0%}", *texts]))

    def _write(self, text: str) -> None:
        echo(text, self._stream)


class CountingLines:
    """Items done, in lines."""

    def __init__(self, stream: TextIO, description: str, total: int | None) -> None:
        self._stream = stream
        self._description = description
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._last_line = (self._started, 0)  # time and count of the line before

    def advance(self, count: int = 1) -> None:
        self._done += count
        seconds = time.monotonic() - self._last_line[0]
        large_part = (self._done - self._last_line[1]) * LINES_PER_RUN >= (self._total or 0)
        if (
            self._done != self._total
            and seconds >= SECONDS_AT_LEAST
            and (large_part or seconds >= SECONDS_AT_MOST)
        ):
            self._last_line = (time.monotonic(), self._done)
            self._write(f"{self._count()} so far{self._time_left()}")

    def stop(self) -> None:
        """Write nothing more: the work failed."""

    def close(self) -> None:
        if self._done:
            self._write(f"{self._count()} in {duration(time.monotonic() - self._started)}")

    def _time_left(self) -> str:
        if self._total is None:
            return ""
        seconds = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        return f", {duration(seconds)} left"

    def _count(self) -> str:
        total = "" if self._total is None or self._done == self._total else f" of {self._total:,}"
        return f"{self._description}: {self._done:,}{total}"

    def _write(self, text: str) -> None:
        echo(text, self._stream)
