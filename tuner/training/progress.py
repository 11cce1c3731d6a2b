"""Progress on a terminal as a live bar, and as plain lines where there is none.

Both go to stderr, so that stdout keeps a command's results. rich is imported only for a terminal.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from tuner.config.stages import Stage
from tuner.printable import printable
from tuner.training.smoothing import Smoothed, horizon_of
from tuner.training.watchers import Outcome, Record, Sample, Tables

PARTS_OF_A_RUN = 20
"""Without a terminal, a line every so many-th part of a run ..."""
SECONDS_AT_LEAST = 2.0
"""... but not sooner than this after the one before ..."""
SECONDS_AT_MOST = 60.0
"""... and not later."""
LONGEST_TEXT = 600
"""Characters of a prompt, answer or reference that are shown."""
GOOD_SCORE = 0.5
"""Scores from here on are green."""


def on_terminal(stream: TextIO) -> bool:
    """Whether a live display can be drawn on this stream."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class ProgressWatcher:
    """The watcher that people look at in a shell."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._display: _Bar | _Lines | None = None

    def begin(self, run_folder: Path, config: Stage, first_step: int, total_steps: int) -> None:
        self._folder = run_folder
        self._before = first_step  # steps that an earlier process took
        self._total = total_steps
        self._last_step = self._before
        self._loss, self._accuracy = Smoothed(horizon_of(total_steps)), Smoothed(horizon_of(total_steps))
        self._record: Record = {}
        self._eval_loss: float | None = None
        self._started = self._clock()
        self._display = (_Bar if on_terminal(self._stream) else _Lines)(
            self._stream, config.name or run_folder.name, self._before, total_steps, self._clock
        )
        if self._before:
            self.message(f"resumed after step {self._before:,} of {total_steps:,}")

    def step(self, record: Record) -> None:
        if self._display is None:
            return
        self._loss.add(record.get("loss"))
        self._accuracy.add(record.get("accuracy"))
        self._eval_loss = _present(record.get("eval_loss"), self._eval_loss)
        self._record = record
        self._last_step = int(record["step"] or 0)
        self._display.step(self._last_step, self._facts, important="eval_loss" in record)

    def samples(self, step: int, samples: list[Sample]) -> None:
        if self._display is None:
            return
        for number, sample in enumerate(samples, start=1):
            self._display.sample(f"step {step:,}, sample {number} of {len(samples)}", sample)

    def report(self, tables: Tables) -> None:
        """Nothing: the command that trains prints it."""

    def message(self, text: str) -> None:
        """Before begin and after end too: a warning must reach someone."""
        if self._display is not None:
            self._display.message(printable(text))
        else:
            print(printable(text), file=self._stream, flush=True)

    def end(self, outcome: Outcome) -> None:
        if self._display is not None:
            self._display.end(
                self._last_step, self._facts, self._summary(outcome), good=outcome == "finished"
            )
            self._display = None

    def _facts(self) -> dict[str, str]:
        """What is worth a glance, by name; what is not known is left out."""
        record = self._record
        facts = {
            "loss": _loss(record.get("loss"), self._loss.value) if record else "",
            "eval loss": _number(self._eval_loss, "eval loss {:.4f}"),
            "accuracy": _number(self._accuracy.value, "accuracy {:.3f}"),
            "lr": _number(record.get("lr"), "lr {:.2e}"),
            "speed": _number(record.get("tokens_per_second"), "{:,.0f} tokens/s"),
            "memory": _number(record.get("memory_gib"), "{:.1f} GiB"),
            "skipped": _number(record.get("bad_steps") or None, "{:.0f} skipped"),
            "left": self._time_left(),
        }
        return {name: text for name, text in facts.items() if text}

    def _time_left(self) -> str:
        """By the wall clock of this process, so that evaluating and saving are in it."""
        done = self._last_step - self._before
        if done <= 0 or self._last_step >= self._total:
            return ""
        seconds = (self._clock() - self._started) / done * (self._total - self._last_step)
        return f"{duration(seconds)} left"

    def _summary(self, outcome: Outcome) -> str:
        seconds = self._clock() - self._started
        parts = [
            f"{outcome} after step {self._last_step:,} of {self._total:,} in {duration(seconds)}",
            _number(self._record.get("tokens"), "{:,.0f} tokens"),
            _number(self._loss.value, "mean loss {:.4f}"),
            _number(self._eval_loss, "eval loss {:.4f}"),
            str(self._folder),
        ]
        return " · ".join(part for part in parts if part)


@contextmanager
def progress_bar(
    description: str, total: int | None, stream: TextIO | None = None
) -> Iterator[Callable[[int], None]]:
    """A bar, or plain lines, around work of `total` items (None: unknown); call what it yields with counts.

    with progress_bar("Tokenising", total=len(rows)) as advance:
        for part in parts:
            advance(len(part))
    """
    out = stream or sys.stderr
    counter = (_CountingBar if on_terminal(out) else _CountingLines)(out, description, total)
    try:
        yield counter.advance
    except BaseException:
        counter.stop()  # what went wrong is said by others
        raise
    counter.close()


def duration(seconds: float) -> str:
    """Seconds as people read them: 8.3 s, 4:05, 2:03:04, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text, or its beginning and how much more there is."""
    text = printable(text.strip("\n"))
    return text if len(text) <= longest else f"{text[:longest]}… (+{len(text) - longest:,} characters)"


def sample_lines(sample: Sample) -> list[tuple[str, str]]:
    """What is shown of a sample, as (name, text)."""
    lines = [("prompt", sample.prompt), ("answer", sample.answer), ("reference", sample.reference)]
    return [(name, shortened(text)) for name, text in lines if text or name == "answer"]


class _Lines:
    """No terminal: whole lines without control codes, each written at once."""

    def __init__(
        self, stream: TextIO, name: str, before: int, total: int, clock: Callable[[], float]
    ) -> None:
        self._stream = stream
        self._total = total
        self._clock = clock
        self._last_line: tuple[float, int] | None = None  # when, after which step

    def step(self, step: int, facts: Callable[[], dict[str, str]], important: bool) -> None:
        if important or self._due(step):
            self._write_step(step, facts())

    def sample(self, title: str, sample: Sample) -> None:
        score = "" if sample.score is None else f", score {sample.score:.2f}"
        self._write(f"{title}{score}")
        for name, text in sample_lines(sample):
            self._write(f"  {name + ':':<10} " + text.replace("\n", "\n" + " " * 13))

    def message(self, text: str) -> None:
        self._write(text)

    def end(self, step: int, facts: Callable[[], dict[str, str]], summary: str, good: bool) -> None:
        if self._last_line is not None and self._last_line[1] != step:
            self._write_step(step, facts())
        self._write(summary)

    def _due(self, step: int) -> bool:
        if self._last_line is None or step >= self._total:
            return True
        seconds = self._clock() - self._last_line[0]
        steps = step - self._last_line[1]
        return seconds >= SECONDS_AT_MOST or (
            seconds >= SECONDS_AT_LEAST and steps * PARTS_OF_A_RUN >= self._total
        )

    def _write_step(self, step: int, facts: dict[str, str]) -> None:
        self._last_line = (self._clock(), step)
        width = len(f"{self._total:,}")
        share = step / self._total if self._total else 1
        self._write("  ".join([f"step {step:>{width},}/{self._total:,}", f"{share:4.0%}", *facts.values()]))

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class _Bar:
    """A terminal: two live lines at the bottom, all else above them."""

    running = False
    """While true, other bars vanish when they are done: they would come back at every evaluation."""

    def __init__(
        self, stream: TextIO, name: str, before: int, total: int, clock: Callable[[], float]
    ) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._progress = _live(stream, columns, transient=False)
        self._task = self._progress.add_task(
            printable(name), total=total, completed=before, facts={}, left=""
        )
        self._progress.start()
        _Bar.running = True

    def step(self, step: int, facts: Callable[[], dict[str, str]], important: bool) -> None:
        known = facts()
        self._progress.update(self._task, completed=step, left=known.pop("left", ""), facts=known)

    def sample(self, title: str, sample: Sample) -> None:
        self._progress.console.print(_sample_panel(title, sample))

    def message(self, text: str) -> None:
        self._progress.console.print(text, style="yellow", markup=False, highlight=False)

    def end(self, step: int, facts: Callable[[], dict[str, str]], summary: str, good: bool) -> None:
        _Bar.running = False
        self._progress.update(self._task, completed=step, left="", facts=facts())
        self._progress.stop()
        self._progress.console.print(
            summary, style="green" if good else "yellow", markup=False, highlight=False, soft_wrap=True
        )


class _CountingBar:
    def __init__(self, stream: TextIO, description: str, total: int | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = _live(stream, columns, transient=_Bar.running)
        self._task = self._progress.add_task(printable(description), total=total, facts={})
        self._progress.start()

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def stop(self) -> None:
        self._progress.stop()

    def close(self) -> None:
        self.stop()


class _CountingLines:
    def __init__(self, stream: TextIO, description: str, total: int | None) -> None:
        self._stream = stream
        self._description = description
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._last_line = (self._started, 0)  # when, after how many

    def advance(self, count: int = 1) -> None:
        self._done += count
        seconds = time.monotonic() - self._last_line[0]
        share = (self._done - self._last_line[1]) * PARTS_OF_A_RUN >= (self._total or 0)
        if (
            self._done != self._total
            and seconds >= SECONDS_AT_LEAST
            and (share or seconds >= SECONDS_AT_MOST)
        ):
            self._last_line = (time.monotonic(), self._done)
            self._write(f"{self._count()} so far")

    def stop(self) -> None:
        """Leave without a word."""

    def close(self) -> None:
        if self._done:
            self._write(f"{self._count()} in {duration(time.monotonic() - self._started)}")

    def _count(self) -> str:
        whole = "" if self._total is None or self._done == self._total else f" of {self._total:,}"
        return f"{printable(self._description)}: {self._done:,}{whole}"

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


@cache
def _console(stream: TextIO) -> Any:
    """One console per terminal: bars within bars stack on it instead of overwriting each other."""
    from rich.console import Console

    return Console(file=stream)


def _live(stream: TextIO, columns: tuple[Any, ...], transient: bool) -> Any:
    """Bars with facts below. They leave a piped stdout alone and are drawn seldom: training needs the CPU."""
    from rich.progress import Progress as RichProgress

    class Live(RichProgress):
        def get_renderables(self) -> Iterator[Any]:
            for task in self.tasks:
                yield self.make_tasks_table([task])
                if task.fields["facts"]:
                    yield _styled(task.fields["facts"])

    return Live(
        *columns,
        console=_console(stream),
        refresh_per_second=4,
        transient=transient,
        expand=False,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )


def _sample_panel(title: str, sample: Sample) -> Any:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    colours = {"prompt": "dim", "answer": "", "reference": "cyan"}
    table = Table.grid(padding=(0, 1))
    for name, text in sample_lines(sample):
        table.add_row(Text(name, style="bold"), Text(text, style=colours[name]))
    if sample.score is not None:
        good = sample.score >= GOOD_SCORE
        table.add_row(
            Text("score", style="bold"), Text(f"{sample.score:.2f}", style="green" if good else "red")
        )
    return Panel(table, title=title, title_align="left", border_style="dim", expand=False)


def _styled(facts: dict[str, str]) -> Any:
    from rich.text import Text

    styles = {"loss": "bold", "eval loss": "magenta", "skipped": "red"}
    return Text("  ").join(Text(text, style=styles.get(name, "dim")) for name, text in facts.items())


def _loss(last: float | None, mean: float | None) -> str:
    shown = "loss not finite" if last is None else f"loss {last:.4f}"
    return shown if mean is None else f"{shown} (mean {mean:.4f})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _present(new: float | None, old: float | None) -> float | None:
    return old if new is None else new
