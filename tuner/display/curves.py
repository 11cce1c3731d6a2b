"""The curves of a run as one picture: loss, learning rate, gradient norm and speed against steps.

matplotlib is used through its objects: pyplot keeps figures alive and guesses at displays.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
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
    draw_noisy,
    draw_small,
    limit_steps,
    mark_skipped,
    plain,
    points_of,
    style,
    usual,
)
from tuner.display.policy_curves import POLICY_SIZE_INCHES, draw_policy
from tuner.training.step_records import of_policy

SIZE_INCHES = (11.0, 6.2)
DOTS_PER_INCH = 130


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
    """The figure itself; what it shows depends on what the records hold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    policy = any(map(of_policy, metrics))
    size = POLICY_SIZE_INCHES if policy else SIZE_INCHES
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    (draw_policy if policy else _draw_losses)(figure, metrics)
    figure.suptitle(plain(title), x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure


def _draw_losses(figure: Figure, metrics: Sequence[dict[str, Any]]) -> None:
    """A large panel with the loss, small ones beside it; of pairs also what is right."""
    accuracy = points_of(metrics, "accuracy")
    panels = [(accuracy, "accuracy over pairs", ORANGE, True)] if accuracy else []
    panels += [
        (points_of(metrics, "lr"), "learning rate", PURPLE, False),
        (points_of(metrics, "grad_norm"), "gradient norm", GREEN, True),
        (points_of(metrics, "tokens_per_second"), "tokens per second", GREY, True),
    ]
    grid = figure.add_gridspec(len(panels), 2, width_ratios=(2.1, 1))
    loss = figure.add_subplot(grid[:, 0])
    small = [figure.add_subplot(grid[row, 1], sharex=loss) for row in range(len(panels))]
    _draw_loss(loss, metrics)
    for axes, panel in zip(small, panels, strict=True):
        draw_small(axes, *panel)
    for axes in small[:-1]:
        axes.tick_params(labelbottom=False)
    for axes in (loss, small[-1]):
        axes.set_xlabel("optimiser step", color=INK, fontsize=9)
    limit_steps(loss, [record["step"] for record in metrics])


def _draw_loss(axes: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    training, held_out = points_of(metrics, "loss"), points_of(metrics, "eval_loss")
    style(axes, "loss")
    low, high = usual([value for _, value in training + held_out])
    if training:
        draw_noisy(axes, training, high, BLUE, "training")
    if held_out:
        draw_held_out(axes, held_out, best=min)
    if training or held_out:
        # a flat loss must not look like a noisy one
        margin = max(0.06 * (high - low), 0.01 * abs(high), 1e-6)
        axes.set_ylim(low - margin, high + margin)
    else:
        axes.text(0.5, 0.5, "no finite loss yet", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])
    mark_skipped(axes, metrics)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, loc="upper right", labelcolor=INK, fontsize=9)
    _add_tokens(axes, points_of(metrics, "tokens"))


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
    top.xaxis.set_major_formatter(lambda value, _: count(value))
    top.set_xlabel("tokens seen", color=GREY, fontsize=9)
    top.tick_params(colors=GREY, labelsize=8, length=3)
    top.spines["top"].set_visible(False)
