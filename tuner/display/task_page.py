"""Models on tasks: in a terminal, and as one page of HTML that needs nothing else."""

from __future__ import annotations

from rich.console import Group, RenderableType

from tuner.display.page_frame import page
from tuner.display.rich_text import rich_text
from tuner.display.sheet import STYLE, html_table, terminal_table
from tuner.evaluation.task_report import TaskReport
from tuner.printable import safe

METHOD = (
    "Intervals are 95%: Wilson's for shares, Tango's for their changes, else by the standard error, resampled by "
    "lm-evaluation-harness where a figure is no mean over rows. A change is measured from the model before in the "
    "table, row by row over the same rows. Models are prompted in their own chat template, or in the run's where they "
    "have none."
)
METHOD_IN_BRIEF = "95% intervals in brackets; a change is from the model above, row by row."


def task_terminal(report: TaskReport) -> RenderableType:
    """The tables for a rich console, with their notes."""
    shown: list[RenderableType] = []
    for title, table in report.tables():
        shown += [rich_text(f"\n{title}" if shown else title, style="bold"), terminal_table(table)]
    notes = [METHOD_IN_BRIEF, *report.notes]
    return Group(*shown, *(rich_text(f"\n{note}", style="dim") for note in notes))


def task_html(report: TaskReport, title: str) -> str:
    """The tables as a page."""
    notes = "".join(f"<li>{safe(note)}</li>" for note in report.notes)
    return page(
        title,
        STYLE,
        [
            f"<h1>{safe(title)}</h1>",
            *(
                f"<section><h2>{safe(name)}</h2>{html_table('plain', table)}</section>"
                for name, table in report.tables()
            ),
            f"<ul>{notes}</ul>" if notes else "",
            f'<section><p class="method">{safe(METHOD)}</p></section>',
        ],
    )
