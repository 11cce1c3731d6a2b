"""Progress on a terminal: live bars at the bottom, all else above them. rich is imported only when one is drawn."""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TextIO

from tuner.display.run_facts import sample_lines
from tuner.printable import printable
from tuner.training.watchers import Sample

GOOD_SCORE = 0.5
"""Scores from here on are green."""


class Bar:
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
        Bar.running = True

    def step(self, step: int, facts: Callable[[], dict[str, str]], important: bool) -> None:
        known = facts()
        self._progress.update(self._task, completed=step, left=known.pop("left", ""), facts=known)

    def sample(self, title: str, sample: Sample) -> None:
        self._progress.console.print(_sample_panel(title, sample))

    def message(self, text: str) -> None:
        self._progress.console.print(text, style="yellow", markup=False, highlight=False)

    def end(self, step: int, facts: Callable[[], dict[str, str]], summary: str, good: bool) -> None:
        Bar.running = False
        self._progress.update(self._task, completed=step, left="", facts=facts())
        self._progress.stop()
        self._progress.console.print(
            summary, style="green" if good else "yellow", markup=False, highlight=False, soft_wrap=True
        )


class CountingBar:
    def __init__(self, stream: TextIO, description: str, total: int | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = _live(stream, columns, transient=Bar.running)
        self._task = self._progress.add_task(printable(description), total=total, facts={})
        self._progress.start()

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def stop(self) -> None:
        self._progress.stop()

    def close(self) -> None:
        self.stop()


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

    colours = {"condition": "magenta", "prompt": "dim", "answer": "", "reference": "cyan"}
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

    styles = {
        **dict.fromkeys(("loss", "score"), "bold"),
        **dict.fromkeys(("eval loss", "held out"), "magenta"),
        "skipped": "red",
    }
    return Text("  ").join(Text(text, style=styles.get(name, "dim")) for name, text in facts.items())
