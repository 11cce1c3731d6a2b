"""The curves of a run as one picture: loss, learning rate, gradient norm and speed against steps.

matplotlib is used through its objects: pyplot keeps figures alive and guesses at displays.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#8E5A9E"
"""Told apart by colour-blind eyes too (Okabe & Ito, 2008; the purple darkened for thin lines)."""
INK, GREY, GRID = "#2B2B2B", "#7A7A7A", "#E8E8E8"
SIZE_INCHES = (11.0, 6.2)
DOTS_PER_INCH = 130
SHARE_OF_STEPS = 1 / 40
"""How far the thick lines look around, as a share of the steps shown."""
FEW = 50
"""Below so many values none is a spike."""

Point = tuple[float, float]


def draw_curves(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write the curves of these records of metrics.jsonl as a PNG, which is replaced as a whole."""
    unfinished = path.with_name(f".writing-{path.name}")
    unfinished.write_bytes(curves_png(metrics, title))
    unfinished.replace(path)


def curves_png(metrics: Sequence[dict[str, Any]], title: str) -> bytes:
    """The same picture as bytes, for notebooks."""
    figure = draw(metrics, title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def draw(metrics: Sequence[dict[str, Any]], title: str) -> Figure:
    """The figure itself: a large panel with the loss, small ones beside it; of pairs also what is right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    accuracy = _points(metrics, "accuracy")
    panels = [(accuracy, "accuracy over pairs", ORANGE, True)] if accuracy else []
    panels += [
        (_points(metrics, "lr"), "learning rate", PURPLE, False),
        (_points(metrics, "grad_norm"), "gradient norm", GREEN, True),
        (_points(metrics, "tokens_per_second"), "tokens per second", GREY, True),
    ]
    grid = figure.add_gridspec(len(panels), 2, width_ratios=(2.1, 1))
    loss = figure.add_subplot(grid[:, 0])
    small = [figure.add_subplot(grid[row, 1], sharex=loss) for row in range(len(panels))]
    _draw_loss(loss, metrics)
    for axes, panel in zip(small, panels, strict=True):
        _draw_small(axes, *panel)
    for axes in small[:-1]:
        axes.tick_params(labelbottom=False)
    for axes in (loss, small[-1]):
        axes.set_xlabel("optimiser step", color=INK, fontsize=9)
    _limit_steps(loss, [record["step"] for record in metrics])
    figure.suptitle(_plain(title), x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure


def _draw_loss(axes: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    training, held_out = _points(metrics, "loss"), _points(metrics, "eval_loss")
    _style(axes, "loss")
    low, high = _usual([value for _, value in training + held_out])
    if training:
        _draw_noisy(axes, training, high, BLUE, "training")
    if held_out:
        _draw_held_out(axes, held_out)
    if training or held_out:
        # a flat loss must not look like a noisy one
        margin = max(0.06 * (high - low), 0.01 * abs(high), 1e-6)
        axes.set_ylim(low - margin, high + margin)
    else:
        axes.text(0.5, 0.5, "no finite loss yet", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])
    _mark_skipped(axes, metrics)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, loc="upper right", labelcolor=INK, fontsize=9)
    _add_tokens(axes, _points(metrics, "tokens"))


def _draw_held_out(axes: Axes, points: list[Point]) -> None:
    axes.plot(
        *zip(*points, strict=True),
        color=ORANGE,
        marker="o",
        markersize=6,
        linewidth=1.3,
        zorder=4,
        markeredgecolor="white",
        markeredgewidth=0.9,
        label="held out",
    )
    best = min(points, key=lambda point: point[1])
    axes.annotate(
        f"best {best[1]:.3f}",
        best,
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
        color=ORANGE,
        fontsize=8.5,
        zorder=5,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )


def _draw_small(axes: Axes, points: list[Point], name: str, colour: str, noisy: bool = True) -> None:
    _style(axes, name, small=True)
    if not points:
        axes.set_yticks([])
        return
    low, high = _usual([value for _, value in points])
    if noisy:
        _draw_noisy(axes, points, high, colour, None)
    else:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, **_dot(points))
    if max(high, 0) > min(low, 0):
        axes.set_ylim(min(low, 0), 1.08 * high)  # from zero on: a drop by half should look like one


def _draw_noisy(axes: Axes, points: list[Point], high: float, colour: str, label: str | None) -> None:
    """The values, faint, and their mean, for which a spike counts as the highest usual value."""
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1.0, **_dot(points))
    means = _centred([min(value, high) for value in values], len(values) * SHARE_OF_STEPS)
    axes.plot(steps, means, color=colour, linewidth=2.0, label=label, zorder=3, **_dot(points))


def _centred(values: list[float], horizon: float) -> list[float]:
    """Mean with weights falling to both sides: unlike a running mean it does not lag behind."""
    decay = 1 - 1 / max(1.0, horizon)
    before = _decayed_sums(values, decay)
    after = _decayed_sums(values[::-1], decay)[::-1]
    ones = _decayed_sums([1.0] * len(values), decay)
    return [(before[i] + after[i] - value) / (ones[i] + ones[-1 - i] - 1) for i, value in enumerate(values)]


def _decayed_sums(values: list[float], decay: float) -> list[float]:
    return list(accumulate(values, lambda total, value: decay * total + value))


def _dot(points: list[Point]) -> dict[str, Any]:
    """One point makes no line: show it as a dot."""
    return {"marker": "o", "markersize": 6} if len(points) == 1 else {}


def _mark_skipped(axes: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    skipped = [record["step"] for record in metrics if record.get("loss", 0.0) is None]
    if skipped:
        axes.plot(
            skipped,
            [0.015] * len(skipped),
            linestyle="",
            marker="x",
            color=INK,
            markersize=6,
            transform=axes.get_xaxis_transform(),
            label=f"skipped ({len(skipped)})",
        )


def _usual(values: list[float]) -> tuple[float, float]:
    """Lowest and highest value to show: a few spikes of a long run may leave the picture above."""
    if not values:
        return 0.0, 0.0
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    spiky = len(ordered) >= FEW and high - low > 3 * (usual - low) > 0
    return low, (low + 1.5 * (usual - low) if spiky else high)


def _limit_steps(axes: Axes, steps: list[int]) -> None:
    if steps:
        margin = max(0.5, 0.015 * (max(steps) - min(steps)))
        axes.set_xlim(min(steps) - margin, max(steps) + margin)


def _add_tokens(axes: Axes, tokens: list[Point]) -> None:
    """Tokens seen along the top. Steps hold about as many each, so that a straight line relates the two."""
    if len(tokens) < 2 or tokens[-1][0] == tokens[0][0] or tokens[-1][1] <= tokens[0][1]:
        return
    from matplotlib.ticker import MaxNLocator

    (first, at_first), (last, at_last) = tokens[0], tokens[-1]
    slope = (at_last - at_first) / (last - first)
    top = axes.secondary_xaxis(
        "top",
        functions=(
            lambda step: at_first + (step - first) * slope,
            lambda token: first + (token - at_first) / slope,
        ),
    )
    top.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    top.xaxis.set_major_formatter(lambda value, _: _count(value))
    top.set_xlabel("tokens seen", color=GREY, fontsize=9)
    top.tick_params(colors=GREY, labelsize=8, length=3)
    top.spines["top"].set_visible(False)


def _style(axes: Axes, name: str, small: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(name, loc="left", fontsize=10, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=8 if small else 9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=5 if small else 8))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if small else 8))
    axes.yaxis.set_major_formatter(lambda value, _: _count(value))


def _points(metrics: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """(step, value) where there is a finite value."""
    found = ((record["step"], record.get(name)) for record in metrics)
    return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


def _count(value: float) -> str:
    """12,300 as 12.3k, 4e9 as 4G, 0.0002 as 2e-4."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    if 0 < abs(value) < 1e-2:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def _plain(title: str) -> str:
    """A title in which a dollar sign does not begin a formula."""
    return title.replace("$", r"\$")
