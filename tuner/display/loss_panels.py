"""The large panel of a stage that follows a loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from tuner.display.panels import (
    GRAY,
    INK,
    Point,
    count,
    draw_held_out,
    draw_noisy,
    mark_skipped,
    show_empty,
    style,
    usual,
)
from tuner.training.figures import Metrics, Panel, points_of


def draw_loss(axes: Axes, panel: Panel, metrics: Metrics, around: float) -> None:
    """A loss in training and on held-out rows, whose lowest is named; tokens seen stand along the top."""
    training, held_out = points_of(metrics, panel.key), points_of(metrics, panel.held_out)
    style(axes, panel.title)
    low, high = usual([value for _, value in training + held_out])
    if training:
        draw_noisy(axes, training, high, panel.color, "training", around)
    if held_out:
        draw_held_out(axes, held_out, best=min)
    if training or held_out:
        # a flat loss must not look like a noisy one
        margin = max(0.06 * (high - low), 0.01 * abs(high), 1e-6)
        axes.set_ylim(low - margin, high + margin)
    else:
        show_empty(axes, f"no finite {panel.title} yet")
    mark_skipped(axes, metrics)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, loc="upper right", labelcolor=INK, fontsize=9)
    _add_tokens(axes, points_of(metrics, "tokens"))


def _add_tokens(axes: Axes, tokens: list[Point]) -> None:
    """Tokens seen, along the top. Steps hold about as many each, so that a straight line relates the two."""
    if len(tokens) < 2 or tokens[-1][0] == tokens[0][0] or tokens[-1][1] <= tokens[0][1]:
        return
    from matplotlib.ticker import MaxNLocator

    (first, at_first), (last, at_last) = tokens[0], tokens[-1]
    slope = (at_last - at_first) / (last - first)

    def tokens_at(step: Any) -> Any:
        return at_first + (step - first) * slope

    def step_at(seen: Any) -> Any:
        return first + (seen - at_first) / slope

    top = axes.secondary_xaxis("top", functions=(tokens_at, step_at))
    top.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    top.xaxis.set_major_formatter(lambda value, _: count(value))
    top.set_xlabel("tokens seen", color=GRAY, fontsize=9)
    top.tick_params(colors=GRAY, labelsize=8, length=3)
    top.spines["top"].set_visible(False)
