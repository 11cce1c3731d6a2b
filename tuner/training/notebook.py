"""A live table and curve in Jupyter, redrawn in place at most once a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from tuner.config.stages import Stage
from tuner.training.progress import duration, shortened
from tuner.training.smoothing import Smoothed, horizon_of
from tuner.training.watchers import Outcome, Record, Sample, Tables

SECONDS_BETWEEN = 1.0
"""Shortest time between two drawings."""
POINTS_DRAWN = 300
"""Steps that the curve shows at most, evenly chosen: a notebook keeps what it displays."""
MESSAGES_SHOWN = 6
WIDTH, HEIGHT, MARGIN = 620, 200, 42
"""The curve's size in pixels; the margin holds the labels at the left and below."""
BLUE, ORANGE = "#0072B2", "#D55E00"

Point = tuple[float, float]


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel; never imports IPython for it."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class NotebookWatcher:
    """Shows a run in the output of its cell. Outside Jupyter it shows nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._handle: Any = None
        self._drawn = -SECONDS_BETWEEN

    def begin(self, run_folder: Path, config: Stage, first_step: int, total_steps: int) -> None:
        self._folder, self._total, self._before = run_folder, total_steps, first_step
        self._losses: list[Point] = []
        self._means: list[Point] = []
        self._held_out: list[Point] = []
        self._mean = Smoothed(horizon_of(total_steps))
        self._record: Record = {"step": first_step}
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
        self._record = record
        step, loss, held_out = record["step"], record.get("loss"), record.get("eval_loss")
        if step is not None and loss is not None:
            self._losses.append((step, loss))
            self._means.append((step, self._mean.add(loss) or 0.0))
        if step is not None and held_out is not None:
            self._held_out.append((step, held_out))
        self._draw()

    def samples(self, step: int, samples: list[Sample]) -> None:
        if self._handle is not None:
            self._samples = samples
            self._draw()

    def report(self, tables: Tables) -> None:
        """Nothing: it stands in the run's folder."""

    def message(self, text: str) -> None:
        if self._handle is not None:
            self._messages.append(text)
            self._draw(at_once=True)
        elif in_notebook():
            print(text)

    def end(self, outcome: Outcome) -> None:
        if self._handle is not None:
            self._outcome = outcome
            self._draw(at_once=True)
            self._handle = None

    def html(self) -> str:
        """All that is shown; colours follow the notebook's theme."""
        parts = [
            f"<b>{escape(str(self._folder))}</b> {escape(self._outcome)}",
            self._bar(),
            _table(self._facts()),
            curve(self._losses, self._means, self._held_out),
            *(
                f'<div style="color:{ORANGE}">{escape(text)}</div>'
                for text in self._messages[-MESSAGES_SHOWN:]
            ),
            _sample_table(self._samples),
        ]
        return f'<div style="max-width:{WIDTH + 20}px">{"".join(parts)}</div>'

    def _draw(self, at_once: bool = False) -> None:
        if at_once or self._clock() - self._drawn >= SECONDS_BETWEEN:
            from IPython.display import HTML

            self._handle.update(HTML(self.html()))
            self._drawn = self._clock()

    def _bar(self) -> str:
        share = (self._record["step"] or 0) / self._total if self._total else 1.0
        return (
            '<div style="height:6px;border-radius:3px;background:rgba(128,128,128,.25);margin:6px 0">'
            f'<div style="height:6px;border-radius:3px;background:{BLUE};width:{share:.1%}"></div></div>'
        )

    def _facts(self) -> list[tuple[str, str]]:
        record, step = self._record, int(self._record["step"] or 0)
        seconds = self._clock() - self._started
        done = step - self._before
        left = seconds / done * (self._total - step) if done > 0 else None
        facts: list[tuple[str, float | None, Callable[[float], str]]] = [
            ("loss", record.get("loss"), "{:.4f}".format),
            ("mean loss", self._mean.value, "{:.4f}".format),
            ("held-out loss", self._held_out[-1][1] if self._held_out else None, "{:.4f}".format),
            ("learning rate", record.get("lr"), "{:.2e}".format),
            ("tokens", record.get("tokens"), "{:,.0f}".format),
            ("tokens/s", record.get("tokens_per_second"), "{:,.0f}".format),
            ("memory", record.get("memory_gib"), "{:.1f} GiB".format),
            ("skipped", record.get("bad_steps") or None, "{:.0f}".format),
            ("left", left if step < self._total else None, duration),
        ]
        shown = [(name, form(value)) for name, value, form in facts if value is not None]
        return [("step", f"{step:,} of {self._total:,}"), *shown]


def curve(losses: list[Point], means: list[Point], held_out: list[Point]) -> str:
    """The losses as SVG: every step faint, their mean, and the held-out ones as dots. Costs a millisecond."""
    if len(losses) < 2:
        return ""
    shown, mean = _thinned(losses), _thinned(means)
    values = [value for _, value in [*shown, *held_out]]
    low, high = min(values), max(values)
    first, last = losses[0][0], losses[-1][0]

    def place(point: Point) -> tuple[float, float]:
        x = MARGIN + (point[0] - first) / (last - first) * (WIDTH - MARGIN - 8)
        y = 8 + (high - point[1]) / ((high - low) or 1.0) * (HEIGHT - 32)
        return x, y

    def line(points: list[Point], opacity: float, width: float) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
        style = f'stroke="{BLUE}" stroke-opacity="{opacity}" stroke-width="{width}"'
        return f'<polyline points="{path}" fill="none" {style}/>'

    def dot(point: Point) -> str:
        x, y = place(point)
        title = f"<title>step {point[0]:,.0f}: {point[1]:.4f}</title>"
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{ORANGE}">{title}</circle>'

    drawn = [line(shown, 0.3, 1.0), line(mean, 1.0, 2.0), *map(dot, held_out)]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="loss against steps">'
        f"{_labels(low, high, first, last)}{''.join(drawn)}</svg>"
    )


def _labels(low: float, high: float, first: float, last: float) -> str:
    bottom, right = HEIGHT - 24, WIDTH - 8
    style = 'fill="currentColor" fill-opacity=".7" font-size="11" font-family="sans-serif"'
    rule = 'stroke="currentColor" stroke-opacity=".35"'
    return (
        f'<path d="M{MARGIN} 8V{bottom}H{right}" fill="none" {rule}/>'
        f'<text x="{MARGIN - 5}" y="14" text-anchor="end" {style}>{high:.3g}</text>'
        f'<text x="{MARGIN - 5}" y="{bottom}" text-anchor="end" {style}>{low:.3g}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 8}" {style}>{first:,.0f}</text>'
        f'<text x="{right}" y="{HEIGHT - 8}" text-anchor="end" {style}>step {last:,.0f}</text>'
    )


def _thinned(points: list[Point]) -> list[Point]:
    """At most POINTS_DRAWN of them, evenly chosen, the last among them."""
    stride = -(-len(points) // POINTS_DRAWN)
    return points[(len(points) - 1) % stride :: stride]


def _table(facts: list[tuple[str, str]]) -> str:
    cells = "".join(
        f'<div style="margin-right:18px"><div style="opacity:.6;font-size:11px">{escape(name)}</div>'
        f'<div style="font-variant-numeric:tabular-nums">{escape(text)}</div></div>'
        for name, text in facts
    )
    return f'<div style="display:flex;flex-wrap:wrap">{cells}</div>'


def _sample_table(samples: list[Sample]) -> str:
    if not samples:
        return ""
    scored = any(sample.score is not None for sample in samples)
    names = ["prompt", "answer", "reference", *(["score"] if scored else [])]
    head = "".join(f'<th style="text-align:left">{name}</th>' for name in names)
    rows = "".join(
        f"<tr>{''.join(_cell(text) for text in _texts(sample, scored))}</tr>" for sample in samples
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _texts(sample: Sample, scored: bool) -> list[str]:
    texts = [shortened(text) for text in (sample.prompt, sample.answer, sample.reference)]
    return [*texts, "" if sample.score is None else f"{sample.score:.2f}"] if scored else texts


def _cell(text: str) -> str:
    return f'<td style="text-align:left;white-space:pre-wrap;vertical-align:top">{escape(text)}</td>'
