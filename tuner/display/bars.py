"""Progress on a terminal: live bars at the bottom, everything else above them.

rich is imported only when a bar is drawn.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TextIO

from tuner.display.rich_text import rich_text
from tuner.display.run_facts import Fact, Tone
from tuner.display.sample_text import sample_lines
from tuner.training.watchers import Sample

GOOD_SCORE = 0.5
"""Scores from here on are green."""


class Bar:
    """A run's progress: two live lines."""

    running = False
    """Whether a run's bar is on screen. Other bars then vanish when they are done: every evaluation would leave one."""

    def __init__(
        self, stream: TextIO, name: str, before: int, total: int, clock: Callable[[], float]
    ) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

        columns = (
            _text_column("{task.description}", "bold"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _text_column("{task.fields[left]}"),
        )
        self._progress = _live(stream, columns, transient=False)
        self._task = self._progress.add_task(name, total=total, completed=before, facts=[], left="")
        self._progress.start()
        Bar.running = True

    def step(self, step: int, facts: Callable[[], list[Fact]], important: bool) -> None:
        """Time left stands beside the bar, the other facts below it."""
        shown = facts()
        left = "".join(fact.text for fact in shown if fact.tone == "time left")
        self._progress.update(self._task, completed=step, left=left, facts=_below(shown))

    def sample(self, title: str, sample: Sample) -> None:
        self._progress.console.print(_sample_panel(title, sample))

    def message(self, text: str) -> None:
        self._progress.console.print(rich_text(text, "yellow"))

    def end(self, step: int, facts: Callable[[], list[Fact]], summary: str, good: bool) -> None:
        Bar.running = False
        self._progress.update(self._task, completed=step, left="", facts=_below(facts()))
        self._progress.stop()
        self._progress.console.print(rich_text(summary, "green" if good else "yellow"), soft_wrap=True)


class CountingBar:
    """Items done, as a bar."""

    def __init__(self, stream: TextIO, description: str, total: int | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn

        times = (TimeElapsedColumn(), *(() if total is None else (TimeRemainingColumn(),)))
        columns = (_text_column("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
        self._progress = _live(stream, columns, transient=Bar.running)
        self._task = self._progress.add_task(description, total=total, facts=[])
        self._progress.start()

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def stop(self) -> None:
        self._progress.stop()

    def close(self) -> None:
        self.stop()


@cache
def _console(stream: TextIO) -> Any:
    """One console per terminal: nested bars stack on it instead of overwriting each other."""
    from rich.console import Console

    return Console(file=stream)


def _live(stream: TextIO, columns: tuple[Any, ...], transient: bool) -> Any:
    """Bars with facts below. A piped stdout is left alone; redraws are rare, because training needs the CPU."""
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
        # rich would redirect stdout to the bar's stream: piped results would end up on stderr.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )


def _text_column(template: str, style: str = "") -> Any:
    """A field of a bar's task as nothing but text: rich's own column would read markup in it."""
    from rich.progress import ProgressColumn

    class PlainColumn(ProgressColumn):
        def render(self, task: Any) -> Any:
            return rich_text(template.format(task=task), style)

    return PlainColumn()


def _sample_panel(title: str, sample: Sample) -> Any:
    from rich.panel import Panel
    from rich.table import Table

    styles = {"condition": "magenta", "prompt": "dim", "answer": "", "reference": "cyan"}
    table = Table.grid(padding=(0, 1))
    for name, text in sample_lines(sample):
        table.add_row(rich_text(name, "bold"), rich_text(text, styles[name]))
    if sample.score is not None:
        is_good = sample.score >= GOOD_SCORE
        table.add_row(
            rich_text("score", "bold"), rich_text(f"{sample.score:.2f}", "green" if is_good else "red")
        )
    return Panel(table, title=rich_text(title), title_align="left", border_style="dim", expand=False)


def _below(facts: list[Fact]) -> list[Fact]:
    """The facts shown below the bar."""
    return [fact for fact in facts if fact.tone != "time left"]


STYLES: dict[Tone, str] = {"plain": "dim", "main": "bold", "held out": "magenta", "warning": "red"}


def _styled(facts: list[Fact]) -> Any:
    return rich_text("  ").join(rich_text(fact.text, STYLES.get(fact.tone, "dim")) for fact in facts)
