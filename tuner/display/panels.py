"""Panels of curves.png that any stage can declare, and the parts of all panels: axes, means, held-out dots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from tuner.printable import printable
from tuner.training.figures import Metrics, Panel, points_of, skipped

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#8E5A9E"
AMBER, SKY = "#E69F00", "#56B4E9"
"""Distinguishable to color-blind readers too (Okabe & Ito, 2008; the purple darkened for thin lines)."""
INK, GRAY, GRID = "#2B2B2B", "#7A7A7A", "#E8E8E8"
SHARE_OF_STEPS = 1 / 40
"""Steps that a mean covers on each side, as a share of the steps shown."""
FEW = 50
"""Number of values below which none counts as a spike."""

Point = tuple[float, float]


def draw_series(axes: Axes, panel: Panel, metrics: Metrics, around: float) -> None:
    """One noisy series with its mean, from zero on."""
    points = points_of(metrics, panel.key)
    style(axes, panel.title, small=True)
    if not points:
        axes.set_yticks([])
        return
    low, high = usual([value for _, value in points])
    draw_noisy(axes, points, high, panel.color, None, around)
    start_at_zero(axes, low, high)


def draw_exact(axes: Axes, panel: Panel, metrics: Metrics, around: float) -> None:
    """One series without noise, such as a learning rate, from zero on."""
    points = points_of(metrics, panel.key)
    style(axes, panel.title, small=True)
    if not points:
        axes.set_yticks([])
        return
    axes.plot(*zip(*points, strict=True), color=panel.color, linewidth=1.8, **dot(points))
    start_at_zero(axes, *usual([value for _, value in points]))


def draw_share(axes: Axes, panel: Panel, metrics: Metrics, around: float) -> None:
    """One noisy series of shares, on an axis from 0 to 1."""
    draw_series(axes, panel, metrics, around)
    if points_of(metrics, panel.key):
        axes.set_ylim(0, 1.05)


def start_at_zero(axes: Axes, low: float, high: float) -> None:
    """Limits from zero on, so that a drop by half looks like one."""
    if max(high, 0) > min(low, 0):
        axes.set_ylim(min(low, 0), 1.08 * high)


def draw_noisy(
    axes: Axes, points: list[Point], high: float, color: str, label: str | None, around: float = 1.0
) -> None:
    """The values, faint, and their mean, in which a spike counts as `high`, the highest usual value."""
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=1.0, **dot(points))
    usual_points = [(step, min(value, high)) for step, value in points]
    draw_mean(axes, usual_points, around, color=color, linewidth=2.0, label=label, zorder=3)


def draw_mean(axes: Axes, points: list[Point], around: float, **look: Any) -> None:
    """The mean of a noisy series, over at least `around` steps to both sides."""
    steps, values = zip(*points, strict=True)
    means = centered(values, max(around, len(values) * SHARE_OF_STEPS))
    axes.plot(steps, means, **look, **dot(points))


def draw_held_out(
    axes: Axes, points: list[Point], best: Callable[..., Point] | None = None, label: str | None = "held out"
) -> None:
    """Values measured now and then; best: `min` or `max`, to write the best value beside it."""
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


def centered(values: Sequence[float], horizon: float) -> list[float]:
    """Mean with weights falling by 1 - 1/horizon to both sides: unlike a running mean it does not lag behind."""
    decay = 1 - 1 / max(1.0, horizon)
    before = _decayed_sums(values, decay)
    after = _decayed_sums(values[::-1], decay)[::-1]
    ones = _decayed_sums([1.0] * len(values), decay)
    return [(before[i] + after[i] - value) / (ones[i] + ones[-1 - i] - 1) for i, value in enumerate(values)]


def _decayed_sums(values: Sequence[float], decay: float) -> list[float]:
    return list(accumulate(values, lambda total, value: decay * total + value))


def dot(points: list[Point]) -> dict[str, Any]:
    """A line needs two points: a single one is shown as a dot."""
    return {"marker": "o", "markersize": 6} if len(points) == 1 else {}


def mark_skipped(axes: Axes, metrics: Metrics) -> None:
    """Crosses at the foot of a panel for the steps that were skipped."""
    steps = [record["step"] for record in metrics if skipped(record)]
    if steps:
        axes.plot(
            steps,
            [0.015] * len(steps),
            linestyle="",
            marker="x",
            color=INK,
            markersize=6,
            transform=axes.get_xaxis_transform(),
            label=f"skipped ({len(steps)})",
        )


def show_empty(axes: Axes, text: str) -> None:
    """A text in place of the values that a panel does not have."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GRAY)
    axes.set_yticks([])


def usual(values: list[float]) -> tuple[float, float]:
    """Lowest and highest value to show; a few spikes of a long run may lie above the panel."""
    if not values:
        return 0.0, 0.0
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    spiky = len(ordered) >= FEW and high - low > 3 * (usual - low) > 0
    return low, (low + 1.5 * (usual - low) if spiky else high)


def limit_steps(axes: Axes, steps: list[int]) -> None:
    """The x axis ends a little before the first and after the last step."""
    if steps:
        margin = max(0.5, 0.015 * (max(steps) - min(steps)))
        axes.set_xlim(min(steps) - margin, max(steps) + margin)


def style(axes: Axes, title: str, small: bool = False) -> None:
    """Title, grid, ticks and colors of a panel."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRAY)
    axes.tick_params(colors=INK, labelsize=8 if small else 9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=5 if small else 8))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if small else 8))
    axes.yaxis.set_major_formatter(lambda value, _: count(value))


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
    """The text for matplotlib, which cannot draw every character; dollar signs begin no formula."""
    return printable(text).replace("$", r"\$")
