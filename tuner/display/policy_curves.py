"""The curves of PPO: what its answers are worth, by the learned score and by gold, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from tuner.display.panels import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    Point,
    count,
    draw_held_out,
    draw_mean,
    draw_noisy,
    draw_small,
    limit_steps,
    mark_skipped,
    plain,
    points_of,
    style,
)
from tuner.training.step_records import conditions, warming_up

POLICY_SIZE_INCHES = (13.0, 7.4)
AMBER, SKY = "#E69F00", "#56B4E9"
CONDITION_LOOKS = (
    {"color": GREEN},
    {"color": PURPLE},
    {"color": AMBER},
    {"color": SKY},
    {"color": INK},
    {"color": GREY, "linestyle": "--"},
)
"""Of the conditions, in their order; the colours of the mean and of the held-out rows are left to those."""
SHORTEST = 2
"""Below so many conditions theirs is the score that is drawn anyway; above the looks they would be a tangle."""
LONGEST_NAME = 18
WARM_UP = "#F2F2F2"
AROUND = 3.0
"""Steps that a mean looks around at least: a rollout is noisy, and runs have few."""
LOWEST_EXPLAINED = -1.0
"""A critic that explains less is as good as none; one such step would flatten the rest."""

Metrics = Sequence[dict[str, Any]]
Panel = Callable[["Axes"], None]


def draw_policy(figure: Figure, metrics: Metrics) -> None:
    """Large panels with the scores at the left, small ones with the policy's and the critic's health at the right."""
    large, small = _large(metrics), _small(metrics)
    halves = figure.add_gridspec(1, 2, width_ratios=(1.25, 1))
    left = halves[0].subgridspec(len(large), 1, height_ratios=[share for _, share in large])
    rows = -(-len(small) // 2)
    right = halves[1].subgridspec(rows, 2)
    score = figure.add_subplot(left[0])
    others = [figure.add_subplot(left[row], sharex=score) for row in range(1, len(large))]
    beside = [figure.add_subplot(right[place // 2, place % 2], sharex=score) for place in range(len(small))]
    for axes, panel in zip([score, *others, *beside], [*(panel for panel, _ in large), *small], strict=True):
        panel(axes)
        _shade_warm_up(axes, metrics)
    _name_warm_up(score, metrics)
    lowest = {([score, *others])[-1], *beside[-2:]}
    for axes in (score, *others, *beside):
        axes.tick_params(labelbottom=axes in lowest)
        if axes in lowest:
            axes.set_xlabel("step", color=INK, fontsize=9)
    limit_steps(score, [record["step"] for record in metrics])


def _large(metrics: Metrics) -> list[tuple[Panel, float]]:
    """The panels at the left and their shares of the height."""
    names = [name for name in conditions(metrics) if points_of(metrics, f"score/{name}")]
    names = names if SHORTEST <= len(names) <= len(CONDITION_LOOKS) else []
    panels: list[tuple[Panel, float]] = [(partial(_draw_score, metrics=metrics), 2.0)]
    if points_of(metrics, "eval_gold"):
        panels.append((partial(_draw_gold, metrics=metrics, names=names), 1.2))
    if names:
        panels.append((partial(_draw_conditions, metrics=metrics, names=names), 1.2))
    return panels


def _small(metrics: Metrics) -> list[Panel]:
    """The panels at the right; what never happened has none."""
    points = partial(points_of, metrics)

    def series(found: list[Point], name: str, colour: str) -> Panel:
        return partial(draw_small, points=found, name=name, colour=colour, around=AROUND)

    panels = [
        series(points("kl"), "KL to the reference, per token", PURPLE),
        series(points("entropy"), "entropy, nats per token", PURPLE),
        series(points("length"), "answer length, tokens", GREEN),
        partial(_draw_share, points=points("ended"), name="answers that ended", colour=GREEN),
        partial(_draw_critic, metrics=metrics),
        partial(_draw_norms, metrics=metrics),
    ]
    if any(value > 0 for _, value in points("clipped")):
        panels.append(series(points("clipped"), "share of tokens clipped", PURPLE))
    if replay := points("replay_loss"):
        panels.append(partial(_draw_replay, points=replay, held_out=points("eval_replay_loss")))
    if len(panels) % 2:  # no gap
        panels.append(series(points("seconds"), "seconds per step", GREY))
    return panels


def _draw_score(axes: Axes, metrics: Metrics) -> None:
    scores, held_out = points_of(metrics, "score"), points_of(metrics, "eval_score")
    style(axes, "score by the reward model")
    if scores:
        high = max(value for _, value in scores)
        draw_noisy(axes, scores, high, BLUE, "training", AROUND)
    if held_out:
        draw_held_out(axes, held_out)  # its best may be the best fooled: none is named
    if scores or held_out:
        _keep_flat_flat(axes, scores + held_out)
    else:
        axes.text(0.5, 0.5, "no score yet", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])
    mark_skipped(axes, metrics)
    _legend(axes)


def _draw_gold(axes: Axes, metrics: Metrics, names: list[str]) -> None:
    """The gold score, and faintly that of each condition, which looks as in the panel of the conditions."""
    style(axes, "gold score, held out")
    drawn = points_of(metrics, "eval_gold")
    for name, look in zip(names, CONDITION_LOOKS, strict=False):
        if own := points_of(metrics, f"eval_gold/{name}"):
            axes.plot(*zip(*own, strict=True), linewidth=1.3, alpha=0.75, marker=".", **look)
            drawn = drawn + own
    draw_held_out(axes, points_of(metrics, "eval_gold"), best=max, label="all" if names else None)
    _keep_flat_flat(axes, drawn)
    _legend(axes)


def _draw_conditions(axes: Axes, metrics: Metrics, names: list[str]) -> None:
    style(axes, "score by condition")
    for name, look in zip(names, CONDITION_LOOKS, strict=False):
        label = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        points = points_of(metrics, f"score/{name}")
        draw_mean(axes, points, AROUND, linewidth=1.8, label=plain(label), **look)
    _legend(axes)


def _draw_share(axes: Axes, points: list[Point], name: str, colour: str) -> None:
    draw_small(axes, points, name, colour, around=AROUND)
    if points:
        axes.set_ylim(0, 1.05)


def _draw_critic(axes: Axes, metrics: Metrics) -> None:
    """What the critic explains of the returns; where that is not known, its loss."""
    explained = points_of(metrics, "explained_variance")
    if not explained:
        draw_small(axes, points_of(metrics, "value_loss"), "value loss", AMBER, around=AROUND)
        return
    lowest = min(value for _, value in explained)
    cut = f", cut at {LOWEST_EXPLAINED:.0f}" if lowest < LOWEST_EXPLAINED else ""
    style(axes, f"explained by the critic{cut}", small=True)
    shown = [(step, max(value, LOWEST_EXPLAINED)) for step, value in explained]
    draw_noisy(axes, shown, 1.0, AMBER, None, AROUND)
    axes.set_ylim(min(0.0, 1.05 * max(lowest, LOWEST_EXPLAINED)), 1.05)


def _draw_norms(axes: Axes, metrics: Metrics) -> None:
    """Of both groups of weights; where they differ by powers of ten, in powers of ten."""
    style(axes, "gradient norm", small=True)
    drawn: list[float] = []
    for group, colour in (("policy", PURPLE), ("critic", AMBER)):
        norms = [point for point in points_of(metrics, f"grad_norm_{group}") if point[1] > 0]
        if norms:
            draw_noisy(axes, norms, math.inf, colour, group, AROUND)
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


def _draw_replay(axes: Axes, points: list[Point], held_out: list[Point]) -> None:
    """The loss on replayed text: forgetting is seen here, so that it does not start from zero."""
    style(axes, "replay loss", small=True)
    draw_noisy(axes, points, max(value for _, value in points), BLUE, None, AROUND)
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


def _warm_ups(metrics: Metrics) -> list[tuple[int, int]]:
    """First and last step of each time that the critic alone learned; a step skipped in it belongs to it."""
    found: list[tuple[int, int]] = []
    for without_policy, group in groupby(metrics, lambda record: record.get("policy_loss") is None):
        records = list(group)
        if without_policy and any(map(warming_up, records)):
            found.append((records[0]["step"], records[-1]["step"]))
    return found


def _shade_warm_up(axes: Axes, metrics: Metrics) -> None:
    for first, last in _warm_ups(metrics):
        axes.axvspan(first - 0.5, last + 0.5, color=WARM_UP, linewidth=0, zorder=0)


def _name_warm_up(axes: Axes, metrics: Metrics) -> None:
    for first, _ in _warm_ups(metrics)[:1]:
        axes.annotate(
            "critic warm-up",
            (first - 0.5, 0.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, 5),
            textcoords="offset points",
            color=GREY,
            fontsize=8.5,
        )
