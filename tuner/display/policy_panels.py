"""Panels of a stage whose policy is scored: scores, gold, conditions, critic, gradient norms, replay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from tuner.display.panels import (
    AMBER,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    Point,
    count,
    draw_held_out,
    draw_mean,
    draw_noisy,
    mark_skipped,
    plain,
    show_empty,
    style,
)
from tuner.training.figures import Metrics, Panel, points_of

CONDITION_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": GREEN},
    {"color": PURPLE},
    {"color": AMBER},
    {"color": SKY},
    {"color": INK},
    {"color": GRAY, "linestyle": "--"},
)
"""Of the conditions, in their order; blue and orange are left to the mean and to held-out rows."""
FEWEST_CONDITIONS = 2
"""With fewer, the condition's score is the score; with more than there are looks, the lines would be a tangle."""
LONGEST_NAME = 18
LOWEST_EXPLAINED = -1.0
"""A critic that explains less is as good as none; one such step would flatten the rest."""


def conditions_of(metrics: Metrics, key: str) -> list[str]:
    """Names of the conditions that a key has numbers of ("score/polite"), in the order they first came."""
    prefix = key + "/"
    keys = dict.fromkeys(name for record in metrics for name in record if name.startswith(prefix))
    return [name.removeprefix(prefix) for name in keys]


def drawn_conditions(metrics: Metrics, key: str) -> list[str]:
    """Names of the conditions that have a line each; empty where they are too few or too many."""
    names = [name for name in conditions_of(metrics, key) if points_of(metrics, f"{key}/{name}")]
    return names if FEWEST_CONDITIONS <= len(names) <= len(CONDITION_LOOKS) else []


def has_conditions(metrics: Metrics, panel: Panel) -> bool:
    """Whether there are conditions to draw."""
    return bool(drawn_conditions(metrics, panel.key))


def draw_score(axes: Axes, panel: Panel, metrics: Metrics, around: float) -> None:
    """The training score and the held-out one, whose best is not named: it may be the best at fooling the model."""
    scores, held_out = points_of(metrics, panel.key), points_of(metrics, panel.held_out)
    style(axes, panel.title)
    if scores:
        draw_noisy(axes, scores, max(value for _, value in scores), panel.color, "training", around)
    if held_out:
        draw_held_out(axes, held_out)
    if scores or held_out:
        _keep_flat_flat(axes, scores + held_out)
    else:
        show_empty(axes, "no score yet")
    mark_skipped(axes, metrics)
    _legend(axes)


def draw_gold(
    axes: Axes, panel: Panel, metrics: Metrics, around: float, *, conditions_by: str = "score"
) -> None:
    """A held-out score, and faintly that of each condition, which looks as in the panel of `conditions_by`."""
    names = drawn_conditions(metrics, conditions_by)
    style(axes, panel.title)
    gold = points_of(metrics, panel.key)
    drawn = list(gold)
    for name, look in zip(names, CONDITION_LOOKS, strict=False):
        if points := points_of(metrics, f"{panel.key}/{name}"):
            axes.plot(*zip(*points, strict=True), linewidth=1.3, alpha=0.75, marker=".", **look)
            drawn += points
    draw_held_out(axes, gold, best=max, label="all" if names else None)
    _keep_flat_flat(axes, drawn)
    _legend(axes)


def draw_shares(
    axes: Axes, panel: Panel, metrics: Metrics, around: float, *, keys: Mapping[str, tuple[str, str]]
) -> None:
    """Several noisy series from 0 to 1 (key -> its name and color), small."""
    style(axes, panel.title, small=True)
    for key, (name, color) in keys.items():
        if points := points_of(metrics, key):
            draw_noisy(axes, points, 1.0, color, name, around)
    axes.set_ylim(0, 1.05)
    _legend(axes)


def draw_conditions(axes: Axes, panel: Panel, metrics: Metrics, around: float) -> None:
    """The mean of every condition."""
    style(axes, panel.title)
    for name, look in zip(drawn_conditions(metrics, panel.key), CONDITION_LOOKS, strict=False):
        label = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        points = points_of(metrics, f"{panel.key}/{name}")
        draw_mean(axes, points, around, linewidth=1.8, label=plain(label), **look)
    _legend(axes)


def draw_explained(axes: Axes, panel: Panel, metrics: Metrics, around: float) -> None:
    """Share of a variance that is explained: 1 at most, cut where it is worse than useless."""
    points = points_of(metrics, panel.key)
    lowest = min(value for _, value in points)
    cut = f", cut at {LOWEST_EXPLAINED:.0f}" if lowest < LOWEST_EXPLAINED else ""
    style(axes, f"{panel.title}{cut}", small=True)
    shown = [(step, max(value, LOWEST_EXPLAINED)) for step, value in points]
    draw_noisy(axes, shown, 1.0, panel.color, None, around)
    axes.set_ylim(min(0.0, 1.05 * max(lowest, LOWEST_EXPLAINED)), 1.05)


def draw_norms(axes: Axes, panel: Panel, metrics: Metrics, around: float, *, sets: Mapping[str, str]) -> None:
    """Gradient norms of several sets of weights (name -> color), under `key_NAME`.

    Where they differ by powers of ten, the axis is logarithmic.
    """
    style(axes, panel.title, small=True)
    drawn: list[float] = []
    for name, color in sets.items():
        # A logarithmic axis cannot show 0.
        norms = [point for point in points_of(metrics, f"{panel.key}_{name}") if point[1] > 0]
        if norms:
            draw_noisy(axes, norms, math.inf, color, name, around)
        drawn += [norm for _, norm in norms]
    if not drawn:
        axes.set_yticks([])
    elif max(drawn) < 10 * min(drawn):
        axes.set_ylim(0, 1.08 * max(drawn))
    else:
        _in_powers_of_ten(axes)
    _legend(axes)


def _in_powers_of_ten(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: count(value))


def draw_replay(axes: Axes, panel: Panel, metrics: Metrics, around: float) -> None:
    """A loss in training and on held-out rows, small. Forgetting is a rise, so the axis does not start at zero."""
    points, held_out = points_of(metrics, panel.key), points_of(metrics, panel.held_out)
    style(axes, panel.title, small=True)
    draw_noisy(axes, points, max(value for _, value in points), panel.color, None, around)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=ORANGE, marker="o", markersize=3.5, label="held out")
    _keep_flat_flat(axes, points + held_out)
    _legend(axes)


def _keep_flat_flat(axes: Axes, points: list[Point]) -> None:
    """Limits around the values; a flat series must not look like a noisy one."""
    values = [value for _, value in points]
    low, high = min(values), max(values)
    margin = max(0.1 * (high - low), 0.01 * abs(high), 1e-6)
    axes.set_ylim(low - margin, high + margin)


def _legend(axes: Axes) -> None:
    """Beside the title, where it covers no line."""
    names = axes.get_legend_handles_labels()[1]
    if names:
        axes.legend(
            frameon=False,
            loc="lower right",
            bbox_to_anchor=(1.01, 0.98),
            ncols=len(names),
            labelcolor=INK,
            fontsize=8.5,
            handlelength=1.4,
            columnspacing=1.2,
            borderaxespad=0.1,
        )
