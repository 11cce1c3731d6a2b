"""A live table and curve in Jupyter, redrawn in place at most once a second."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from tuner.config.stage_config import StageConfig
from tuner.display.run_facts import Seen, condition_of, duration, shortened
from tuner.display.smoothing import Smoothed, horizon_of
from tuner.display.svg import BLUE, HEIGHT, ORANGE, WIDTH, Point, curve
from tuner.training.step_records import of_policy, warming_up
from tuner.training.watchers import Outcome, Record, Sample, Tables

SECONDS_BETWEEN = 1.0
"""Shortest time between two drawings."""
MESSAGES_SHOWN = 6
DRAWN = ("loss", "eval_loss", "score", "eval_score", "eval_gold", "kl")
"""Numbers of the record that are drawn against the steps, whatever the stage."""

Facts = list[tuple[str, float | None, Callable[[float], str]]]
"""Name, value and how it is written; a fact without a value is left out."""


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

    def begin(self, run_folder: Path, config: StageConfig, first_step: int, total_steps: int) -> None:
        self._folder, self._total, self._before = run_folder, total_steps, first_step
        self._seen = Seen(total_steps)
        self._step = first_step
        self._series: dict[str, _Series] = defaultdict(lambda: _Series(horizon_of(total_steps)))
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
        self._seen.add(record)
        self._step = int(record["step"] or 0)
        for name in DRAWN:
            self._series[name].add(self._step, record.get(name))
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
            self._policy_curves() if of_policy(self._seen.record) else self._curve("loss", "eval_loss"),
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
        share = self._step / self._total if self._total else 1.0
        return (
            '<div style="height:6px;border-radius:3px;background:rgba(128,128,128,.25);margin:6px 0">'
            f'<div style="height:6px;border-radius:3px;background:{BLUE};width:{share:.1%}"></div></div>'
        )

    def _curve(self, name: str, held_out: str) -> str:
        series, evaluated = self._series[name], self._series[held_out].values
        return curve(series.values, series.means, evaluated, name) if series.values else ""

    def _policy_curves(self) -> str:
        """Of PPO: the score, and below it how far the policy went and what the gold score says."""
        score = self._curve("score", "eval_score")
        kl, gold = self._series["kl"], self._series["eval_gold"].values
        half = {"width": WIDTH // 2, "height": HEIGHT * 2 // 3}
        below = {
            "KL to the reference": curve(kl.values, kl.means, [], "KL", **half),
            "gold score, held out": curve([], [], gold, "gold score", **half),
        }
        cells = "".join(_captioned(name, drawn, "50%") for name, drawn in below.items() if drawn)
        return (
            _captioned("score", score, "100%") + f'<div style="display:flex">{cells}</div>' if score else ""
        )

    def _facts(self) -> list[tuple[str, str]]:
        record, done = self._seen.record, self._step - self._before
        left = (self._clock() - self._started) / done * (self._total - self._step) if done > 0 else None
        facts: Facts = [
            *(_policy_facts(self._seen) if of_policy(record) else _loss_facts(self._seen)),
            ("memory", record.get("memory_gib"), "{:.1f} GiB".format),
            ("skipped", record.get("bad_steps") or None, "{:.0f}".format),
            ("left", left if self._step < self._total else None, duration),
        ]
        shown = [(name, form(value)) for name, value, form in facts if value is not None]
        step = f"{self._step:,} of {self._total:,}"
        return [("step", step + " (critic warm-up)" if warming_up(record) else step), *shown]


class _Series:
    """One number over the steps, and its running mean."""

    def __init__(self, horizon: float) -> None:
        self.values: list[Point] = []
        self.means: list[Point] = []
        self._mean = Smoothed(horizon)

    def add(self, step: int, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self.values.append((step, value))
            self.means.append((step, self._mean.add(value) or 0.0))


def _loss_facts(seen: Seen) -> Facts:
    record = seen.record
    return [
        ("loss", record.get("loss"), "{:.4f}".format),
        ("mean loss", seen.mean("loss"), "{:.4f}".format),
        ("held-out loss", seen.held_out("loss"), "{:.4f}".format),
        ("learning rate", record.get("lr"), "{:.2e}".format),
        ("tokens", record.get("tokens"), "{:,.0f}".format),
        ("tokens/s", record.get("tokens_per_second"), "{:,.0f}".format),
    ]


def _policy_facts(seen: Seen) -> Facts:
    record = seen.record
    return [
        ("score", record.get("score"), "{:.3f}".format),
        ("mean score", seen.mean("score"), "{:.3f}".format),
        ("held-out score", seen.held_out("score"), "{:.3f}".format),
        ("gold score", seen.held_out("gold"), "{:.3f}".format),
        ("KL", record.get("kl"), "{:.4f}".format),
        ("answer length", record.get("length"), "{:,.0f}".format),
        ("ended", seen.mean("ended"), "{:.0%}".format),
        ("entropy", record.get("entropy"), "{:.3f}".format),
        ("explained variance", record.get("explained_variance"), "{:.2f}".format),
        ("tokens", record.get("tokens"), "{:,.0f}".format),
        ("a step takes", record.get("seconds"), duration),
    ]


def _table(facts: list[tuple[str, str]]) -> str:
    cells = "".join(
        f'<div style="margin-right:18px"><div style="opacity:.6;font-size:11px">{escape(name)}</div>'
        f'<div style="font-variant-numeric:tabular-nums">{escape(text)}</div></div>'
        for name, text in facts
    )
    return f'<div style="display:flex;flex-wrap:wrap">{cells}</div>'


def _captioned(name: str, drawn: str, width: str) -> str:
    caption = f'<div style="opacity:.6;font-size:11px">{escape(name)}</div>'
    return f'<div style="width:{width}">{caption}{drawn}</div>'


def _sample_table(samples: list[Sample]) -> str:
    """A condition, a reference and a score get a column where any sample has one."""
    columns: dict[str, list[str]] = {
        "condition": [condition_of(sample) for sample in samples],
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
    return f'<td style="text-align:left;white-space:pre-wrap;vertical-align:top">{escape(text)}</td>'
