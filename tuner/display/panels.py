"""The parts of a run's picture: how a panel looks, and how a noisy series is drawn in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#8E5A9E"
"""Told apart by colour-blind eyes too (Okabe & Ito, 2008; the purple darkened for thin lines)."""
INK, GREY, GRID = "#2B2B2B", "#7A7A7A", "#E8E8E8"
SHARE_OF_STEPS = 1 / 40
"""How far the thick lines look around, as a share of the steps shown."""
FEW = 50
"""Below so many values none is a spike."""

Point = tuple[float, float]


def draw_small(
    axes: Axes, points: list[Point], name: str, colour: str, noisy: bool = True, around: float = 1.0
) -> None:
    """A small panel with one series, from zero on."""
    style(axes, name, small=True)
    if not points:
        axes.set_yticks([])
        return
    low, high = usual([value for _, value in points])
    if noisy:
        draw_noisy(axes, points, high, colour, None, around)
    else:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, **dot(points))
    if max(high, 0) > min(low, 0):
        axes.set_ylim(min(low, 0), 1.08 * high)  # from zero on: a drop by half should look like one


def draw_noisy(
    axes: Axes, points: list[Point], high: float, colour: str, label: str | None, around: float = 1.0
) -> None:
    """The values, faint, and their mean, for which a spike counts as the highest usual value."""
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1.0, **dot(points))
    usual_points = [(step, min(value, high)) for step, value in points]
    draw_mean(axes, usual_points, around, color=colour, linewidth=2.0, label=label, zorder=3)


def draw_mean(axes: Axes, points: list[Point], around: float, **look: Any) -> None:
    """The mean of a noisy series, which looks at least `around` steps to both sides."""
    steps, values = zip(*points, strict=True)
    means = centred(values, max(around, len(values) * SHARE_OF_STEPS))
    axes.plot(steps, means, **look, **dot(points))


def draw_held_out(
    axes: Axes, points: list[Point], best: Callable[..., Point] | None = None, label: str | None = "held out"
) -> None:
    """What was measured now and then; with `min` or `max`, its best is named."""
    axes.plot(
        *zip(*points, strict=True),
        color=ORANGE,
        marker="o",
        markersize=6,
        linewidth=1.3,
        zorder=4,
        markeredgecolor="white",
        markeredgewidth=0.9,
        label=label,
    )
    if best is None:
        return
    place = best(points, key=lambda point: point[1])
    axes.annotate(
        f"best {place[1]:.3f}",
        place,
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
        color=ORANGE,
        fontsize=8.5,
        zorder=5,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )


def centred(values: Sequence[float], horizon: float) -> list[float]:
    """Mean with weights falling to both sides: unlike a running mean it does not lag behind."""
    decay = 1 - 1 / max(1.0, horizon)
    before = _decayed_sums(values, decay)
    after = _decayed_sums(values[::-1], decay)[::-1]
    ones = _decayed_sums([1.0] * len(values), decay)
    return [(before[i] + after[i] - value) / (ones[i] + ones[-1 - i] - 1) for i, value in enumerate(values)]


def _decayed_sums(values: Sequence[float], decay: float) -> list[float]:
    return list(accumulate(values, lambda total, value: decay * total + value))


def dot(points: list[Point]) -> dict[str, Any]:
    """One point makes no line: show it as a dot."""
    return {"marker": "o", "markersize": 6} if len(points) == 1 else {}


def mark_skipped(axes: Axes, metrics: Sequence[dict[str, Any]]) -> None:
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


def usual(values: list[float]) -> tuple[float, float]:
    """Lowest and highest value to show: a few spikes of a long run may leave the picture above."""
    if not values:
        return 0.0, 0.0
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    spiky = len(ordered) >= FEW and high - low > 3 * (usual - low) > 0
    return low, (low + 1.5 * (usual - low) if spiky else high)


def limit_steps(axes: Axes, steps: list[int]) -> None:
    if steps:
        margin = max(0.5, 0.015 * (max(steps) - min(steps)))
        axes.set_xlim(min(steps) - margin, max(steps) + margin)


def style(axes: Axes, name: str, small: bool = False) -> None:
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
    axes.yaxis.set_major_formatter(lambda value, _: count(value))


def points_of(metrics: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """(step, value) where there is a finite value."""
    found = ((record["step"], record.get(name)) for record in metrics)
    return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


def count(value: float) -> str:
    """12,300 as 12.3k, 4e9 as 4G, 0.0002 as 2e-4."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    if 0 < abs(value) < 1e-2:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def plain(text: str) -> str:
    """A text in which a dollar sign does not begin a formula."""
    return text.replace("$", r"\$")
