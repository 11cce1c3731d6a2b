"""The curves of a run as one picture, curves.png, laid out as its stage declares.

matplotlib is used through its objects: pyplot keeps figures alive and guesses at displays.
"""

from __future__ import annotations

import io
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from tuner.display.panels import GRAY, INK, limit_steps, plain
from tuner.training.figures import Metrics, Panel, Picture, StageFigures, phases_of

DOTS_PER_INCH = 130
PHASE = "#F2F2F2"
"""Background of the steps of a named phase."""


def draw_curves(metrics: Metrics, path: Path, title: str, figures: StageFigures) -> None:
    """Write the curves of these records of metrics.jsonl as a PNG, which is replaced as a whole."""
    # A viewer that reloads the file never sees half of it.
    unfinished = path.with_name(f".writing-{path.name}")
    unfinished.write_bytes(curves_png(metrics, title, figures))
    unfinished.replace(path)


def curves_png(metrics: Metrics, title: str, figures: StageFigures) -> bytes:
    """The same picture as bytes."""
    buffer, figure = io.BytesIO(), draw(metrics, title, figures)
    layout = figure.get_layout_engine()
    assert layout is not None
    # once: savefig would lay out, draw, and lay out again
    layout.execute(figure)
    figure.set_layout_engine("none")
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def draw(metrics: Metrics, title: str, figures: StageFigures) -> Figure:
    """The same picture as a figure of matplotlib: its axes are the large panels, then the small ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = figures.picture
    figure = Figure(figsize=picture.size_inches, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    large = [panel for panel in picture.large if panel.shown(metrics, panel)]
    small = _small(picture, metrics)
    large_axes, small_axes = _lay_out(figure, picture, large, len(small))
    phases = _phase_spans(metrics, figures)
    for axes, panel in zip([*large_axes, *small_axes], [*large, *small], strict=True):
        panel.draw(axes, panel, metrics, picture.around)
        for first, last, _ in phases:
            axes.axvspan(first - 0.5, last + 0.5, color=PHASE, linewidth=0, zorder=0)
    _name_phases(large_axes[0], phases)
    _label_steps(picture, large_axes, small_axes)
    limit_steps(large_axes[0], [record["step"] for record in metrics])
    figure.suptitle(plain(title), x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure


def _small(picture: Picture, metrics: Metrics) -> list[Panel]:
    panels = [panel for panel in picture.small if panel.shown(metrics, panel)]
    if picture.filler is not None and len(panels) % picture.columns:
        panels.append(picture.filler)
    return panels


def _lay_out(
    figure: Figure, picture: Picture, large: list[Panel], small: int
) -> tuple[list[Axes], list[Axes]]:
    """The axes of the large panels and of `small` small ones; all share their steps."""
    halves = figure.add_gridspec(1, 2, width_ratios=picture.width_ratios)
    left = halves[0].subgridspec(len(large), 1, height_ratios=[panel.height for panel in large])
    right = halves[1].subgridspec(max(1, -(-small // picture.columns)), picture.columns)
    first = figure.add_subplot(left[0])
    others = [figure.add_subplot(left[row], sharex=first) for row in range(1, len(large))]
    places = (divmod(place, picture.columns) for place in range(small))
    return [first, *others], [figure.add_subplot(right[row, column], sharex=first) for row, column in places]


def _label_steps(picture: Picture, large: list[Axes], small: list[Axes]) -> None:
    """Label the steps below the lowest panels only."""
    lowest = {large[-1], *small[-picture.columns :]}
    for axes in (*large, *small):
        axes.tick_params(labelbottom=axes in lowest)
        if axes in lowest:
            axes.set_xlabel(picture.x_label, color=INK, fontsize=9)


def _phase_spans(metrics: Metrics, figures: StageFigures) -> list[tuple[int, int, str]]:
    """First step, last step and name of every stretch of a named phase."""
    steps = [record["step"] for record in metrics]
    spans = []
    for name, group in groupby(
        zip(phases_of(metrics, figures.phase), steps, strict=True), lambda pair: pair[0]
    ):
        stretch = [step for _, step in group]
        if name:
            spans.append((stretch[0], stretch[-1], name))
    return spans


def _name_phases(axes: Axes, phases: list[tuple[int, int, str]]) -> None:
    """Write the name of each phase where it first begins."""
    starts: dict[str, Any] = {}
    for first, _, name in phases:
        starts.setdefault(name, first)
    for name, first in starts.items():
        axes.annotate(
            name,
            (first - 0.5, 0.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, 5),
            textcoords="offset points",
            color=GRAY,
            fontsize=8.5,
        )
