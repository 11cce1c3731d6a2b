"""How a stage declares where the numbers that it records are shown, charted and drawn.

A stage's `figures.py` is a list of these declarations; progress lines, notebooks, trackers and curves know nothing
else of the stage. Nothing here draws: the functions that do are in `tuner.display`, and are given the declaration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = Sequence[Mapping[str, Any]]
"""Records of metrics.jsonl, in order."""
Reading = Literal["value", "mean", "value and mean", "latest"]
"""Which value of a series is shown: this step's, the running mean, both, or the latest one (values measured on
held-out rows are missing from most records)."""


@dataclass(frozen=True)
class Figure:
    """One number of a step's record, as people read it."""

    key: str
    """Name in the record."""
    format: Callable[[float], str]
    """How a value is written, such as "{:.4f}".format."""
    text: str = "{}"
    """The words around it in a progress line and in the summary: "loss {}", "{} tokens/s"."""
    reading: Reading = "value"
    line: bool = True
    """Whether each progress line shows it."""
    summary: bool = False
    """Whether the last line of a run shows it; of "value and mean" it shows the mean."""
    notebook: str = ""
    """Its name in the notebook's table; empty: not shown there."""
    missing: str | None = None
    """What stands for a value that this step lacks, such as "not finite"; None: the figure is left out."""
    unless: str = ""
    """Key of a better figure: lines and the summary leave this figure out where that key has a value."""
    warning: bool = False
    """Whether it counts what should not happen: hidden while it is 0, and red."""


@dataclass(frozen=True)
class Charts:
    """Where a tracker charts the numbers of a record, as "group/name"."""

    default: str
    """Group of the keys that nothing else names."""
    groups: Mapping[str, str]
    """Group -> its keys, separated by spaces."""
    rules: Mapping[str, str]
    """Key -> chart; where both end in "/" or "_", the beginning of a key -> the beginning of its chart."""
    summaries: Mapping[str, str]
    """Chart -> what a run's summary keeps of it, such as "min,last"."""

    def chart_of(self, key: str) -> str:
        """The chart of a key: eval_loss is eval/loss, lr is train/lr where `default` is "train"."""
        for start, chart in {"eval_": "eval/", **self.rules}.items():
            if chart.endswith("/") and key.startswith(start):
                return chart + key.removeprefix(start)
            if key == start:
                return chart
        group = next((group for group, keys in self.groups.items() if key in keys.split()), self.default)
        return f"{group}/{key}"

    def all_groups(self) -> list[str]:
        """Every group that a chart can be in."""
        ruled = [chart.split("/")[0] for chart in self.rules.values()]
        return list(dict.fromkeys([self.default, "eval", *self.groups, *ruled]))


@dataclass(frozen=True)
class Curve:
    """A series that the notebook draws while the run trains."""

    name: str
    key: str = ""
    """Key of a value of every step, drawn with its running mean."""
    held_out: str = ""
    """Key of values measured now and then, drawn as dots."""
    caption: str = ""
    half: bool = False
    """Whether it takes half of the width, beside another."""


Draw = Callable[["Axes", "Panel", Metrics, float], None]
"""(axes, panel, records, around): draws a panel; `around` is the `Picture.around` of its picture."""
Shown = Callable[[Metrics, "Panel"], bool]


def always(metrics: Metrics, panel: Panel) -> bool:
    return True


def recorded(metrics: Metrics, panel: Panel) -> bool:
    """Whether the panel's key ever had a finite value."""
    return bool(points_of(metrics, panel.key))


def ever_positive(metrics: Metrics, panel: Panel) -> bool:
    return any(value > 0 for _, value in points_of(metrics, panel.key))


@dataclass(frozen=True)
class Panel:
    """A panel of curves.png."""

    key: str
    title: str
    draw: Draw
    color: str = ""
    held_out: str = ""
    """Key of the same number on held-out rows."""
    shown: Shown = always
    height: float = 1.0
    """Height of a large panel, relative to the other large panels."""


@dataclass(frozen=True)
class Picture:
    """curves.png: large panels in a column at the left, small ones in columns at the right."""

    large: Sequence[Panel]
    """The first must always be shown: all others share its steps."""
    small: Sequence[Panel]
    columns: int = 1
    """Columns of the small panels."""
    filler: Panel | None = None
    """Drawn where the small panels would otherwise leave a gap."""
    size_inches: tuple[float, float] = (11.0, 6.2)
    width_ratios: tuple[float, float] = (2.1, 1.0)
    around: float = 1.0
    """Least number of steps that a mean covers on each side: more where single steps are noisy and runs short."""
    x_label: str = "optimizer step"


Phase = Callable[[Mapping[str, Any]], str]
"""Names the phase that a record's step belongs to."""


def no_phase(record: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True)
class StageFigures:
    """Everything that is shown of a stage's records."""

    figures: Sequence[Figure]
    charts: Charts
    curves: Sequence[Curve]
    picture: Picture
    phase: Phase = no_phase
    """Names a step's phase, such as "critic warm-up"; empty where it has no name."""


TOKENS = Figure("tokens", "{:,.0f}".format, "{} tokens", line=False, summary=True, notebook="tokens")
EVERY_STAGE = (
    Figure("memory_gib", "{:.1f} GiB".format, notebook="memory"),
    Figure("bad_steps", "{:.0f}".format, "{} skipped", notebook="skipped", warning=True),
)
"""Figures of the loop itself, which follow those of every stage."""


def skipped(record: Mapping[str, Any]) -> bool:
    """Whether the step was skipped, its loss or gradient not being finite."""
    return record.get("loss", 0.0) is None


def points_of(metrics: Metrics, key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have a finite value."""
    series = ((record["step"], record.get(key)) for record in metrics)
    return [(step, value) for step, value in series if value is not None and math.isfinite(value)]


def phases_of(metrics: Metrics, phase: Phase) -> list[str]:
    """The phase of each record. A skipped step lacks the numbers that show its phase: it takes that of the step before,
    and at the beginning that of the first step that was not skipped."""
    names = [None if skipped(record) else phase(record) for record in metrics]
    first = next((name for name in names if name is not None), "")
    return list(_carried(names, first))


def _carried(names: Sequence[str | None], current: str) -> Iterator[str]:
    for name in names:
        current = current if name is None else name
        yield current
