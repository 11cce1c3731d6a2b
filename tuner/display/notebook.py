"""A live table and curve in Jupyter, redrawn in place at most once a second."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuner.config.stage_config import StageConfig
from tuner.display.durations import duration
from tuner.display.run_facts import RunFacts
from tuner.display.sample_text import shortened
from tuner.display.smoothing import RunningMean, horizon_of
from tuner.display.svg import BLUE, HEIGHT, ORANGE, WIDTH, Point, curve
from tuner.printable import echo, safe
from tuner.training.figures import Curve, StageFigures
from tuner.training.watchers import Outcome, Record, Sample, Tables

SECONDS_BETWEEN = 1.0
"""Shortest time between two drawings."""
MESSAGES_SHOWN = 6


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel; never imports IPython for it."""
    # A kernel has imported IPython already; importing it here would cost every command its time.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class NotebookWatcher:
    """Shows a run in the output of its cell. Outside Jupyter it shows nothing."""

    def __init__(self, figures: StageFigures, clock: Callable[[], float] = time.monotonic) -> None:
        self._figures = figures
        self._clock = clock
        self._handle: Any = None
        self._drawn = -SECONDS_BETWEEN

    def begin(self, run_folder: Path, config: StageConfig, first_step: int, total_steps: int) -> None:
        self._folder, self._total, self._before = run_folder, total_steps, first_step
        self._run_facts = RunFacts(self._figures, total_steps)
        self._step = first_step
        keys = [key for each in self._figures.curves for key in (each.key, each.held_out)]
        self._series = {key: _Series(horizon_of(total_steps)) for key in filter(None, keys)}
        self._samples: list[Sample] = []
        self._messages: list[str] = []
        self._outcome = "training"
        self._started = self._clock()
        if in_notebook():
            from IPython.display import HTML, display

            self._handle = display(HTML(self.html()), display_id=True)

    def step(self, record: Record) -> None:
        if self._handle is None:
            return
        self._run_facts.add(record)
        self._step = int(record["step"] or 0)
        for key, series in self._series.items():
            series.add(self._step, record.get(key))
        self._draw()

    def samples(self, step: int, samples: list[Sample]) -> None:
        if self._handle is not None:
            self._samples = samples
            self._draw()

    def report(self, tables: Tables) -> None:
        """Nothing: the run's folder has it."""

    def message(self, text: str) -> None:
        if self._handle is not None:
            self._messages.append(text)
            self._draw(at_once=True)
        elif in_notebook():
            echo(text)

    def end(self, outcome: Outcome) -> None:
        if self._handle is not None:
            self._outcome = outcome
            self._draw(at_once=True)
            self._handle = None

    def html(self) -> str:
        """Everything that is shown; colors follow the notebook's theme."""
        parts = [
            f"<b>{safe(str(self._folder))}</b> {safe(self._outcome)}",
            self._bar(),
            _fact_table(self._facts()),
            self._curves(),
            *(f'<div style="color:{ORANGE}">{safe(text)}</div>' for text in self._messages[-MESSAGES_SHOWN:]),
            _sample_table(self._samples),
        ]
        return f'<div style="max-width:{WIDTH + 20}px">{"".join(parts)}</div>'

    def _draw(self, at_once: bool = False) -> None:
        if at_once or self._clock() - self._drawn >= SECONDS_BETWEEN:
            from IPython.display import HTML

            self._handle.update(HTML(self.html()))
            self._drawn = self._clock()

    def _bar(self) -> str:
        share = self._step / self._total if self._total else 1.0
        return (
            '<div style="height:6px;border-radius:3px;background:rgba(128,128,128,.25);margin:6px 0">'
            f'<div style="height:6px;border-radius:3px;background:{BLUE};width:{share:.1%}"></div></div>'
        )

    def _curves(self) -> str:
        """The curves of which there are two points; halves stand below the others."""
        whole, half = (
            [svg for each in self._figures.curves if each.half == is_half and (svg := self._curve(each))]
            for is_half in (False, True)
        )
        below = f'<div style="display:flex">{"".join(half)}</div>' if half else ""
        return "".join(whole) + below

    def _curve(self, declared: Curve) -> str:
        size = {"width": WIDTH // 2, "height": HEIGHT * 2 // 3} if declared.half else {}
        series, held_out = (self._series.get(key, _Series(1)) for key in (declared.key, declared.held_out))
        svg = curve(series.values, series.means, held_out.values, declared.name, **size)
        if not svg or not declared.caption:
            return svg
        caption = f'<div style="opacity:.6;font-size:11px">{safe(declared.caption)}</div>'
        return f'<div style="width:{"50%" if declared.half else "100%"}">{caption}{svg}</div>'

    def _facts(self) -> list[tuple[str, str]]:
        """(name, text) of the table above the curves."""
        step = f"{self._step:,} of {self._total:,}"
        phase = self._run_facts.phase
        facts = [("step", f"{step} ({phase})" if phase else step), *self._run_facts.notebook()]
        steps_done, steps_left = self._step - self._before, self._total - self._step
        if steps_done > 0 and steps_left > 0:
            seconds_per_step = (self._clock() - self._started) / steps_done
            facts.append(("left", duration(seconds_per_step * steps_left)))
        return facts


class _Series:
    """One number by step, and its running mean."""

    def __init__(self, horizon: float) -> None:
        self.values: list[Point] = []
        self.means: list[Point] = []
        self._mean = RunningMean(horizon)

    def add(self, step: int, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self.values.append((step, value))
            self.means.append((step, self._mean.add(value) or 0.0))


def _fact_table(facts: list[tuple[str, str]]) -> str:
    cells = "".join(
        f'<div style="margin-right:18px"><div style="opacity:.6;font-size:11px">{safe(name)}</div>'
        f'<div style="font-variant-numeric:tabular-nums">{safe(text)}</div></div>'
        for name, text in facts
    )
    return f'<div style="display:flex;flex-wrap:wrap">{cells}</div>'


def _sample_table(samples: list[Sample]) -> str:
    """Condition, reference and score have a column where any sample has one."""
    columns: dict[str, list[str]] = {
        "condition": [sample.condition or "" for sample in samples],
        "prompt": [shortened(sample.prompt) for sample in samples],
        "answer": [shortened(sample.answer) for sample in samples],
        "reference": [shortened(sample.reference) for sample in samples],
        "score": ["" if sample.score is None else f"{sample.score:.2f}" for sample in samples],
    }
    for optional in ("condition", "reference", "score"):
        if not any(columns[optional]):
            del columns[optional]
    if not samples:
        return ""
    head = "".join(f'<th style="text-align:left">{name}</th>' for name in columns)
    rows = "".join(f"<tr>{''.join(map(_cell, texts))}</tr>" for texts in zip(*columns.values(), strict=True))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(text: str) -> str:
    return f'<td style="text-align:left;white-space:pre-wrap;vertical-align:top">{safe(text)}</td>'
