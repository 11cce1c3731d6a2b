"""Plots of a report card's page, as SVG: no script, no network, colors from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tuner.evaluation.report_card.card import Distribution, LengthBin
from tuner.evaluation.report_card.measures import Accuracy, Calibration
from tuner.printable import printable, safe

WIDTH, HEIGHT = 500, 300
LABEL = 19
"""Characters of a name that fit beside a bar; the tooltip has it in full."""
BAR, GAP = 15, 14
"""Height of a bar and the gap below it, in pixels."""

Span = tuple[float, float]


@dataclass(frozen=True)
class Axes:
    """A rectangle of the picture (pixels) and the ranges of values along its sides."""

    left: float
    top: float
    right: float
    bottom: float
    along: Span
    up: Span = (0.0, 1.0)

    def x(self, value: float) -> float:
        share = (value - self.along[0]) / (self.along[1] - self.along[0])
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        share = (value - self.up[0]) / (self.up[1] - self.up[0])
        return self.bottom - share * (self.bottom - self.top)

    def across(self, values: Iterable[float], shown: str = "{:g}") -> str:
        """Vertical grid lines with their values below."""
        return "".join(
            line(self.x(value), self.top, self.x(value), self.bottom, "grid")
            + text(self.x(value), self.bottom + 16, _figure(value, shown), "middle")
            for value in values
        )

    def upward(self, values: Iterable[float], shown: str = "{:g}") -> str:
        """Horizontal grid lines with their values on the left."""
        return "".join(
            line(self.left, self.y(value), self.right, self.y(value), "grid")
            + text(self.left - 7, self.y(value) + 4, _figure(value, shown), "end")
            for value in values
        )

    def named(self, along: str, up: str = "") -> str:
        """Names of the axes."""
        return text((self.left + self.right) / 2, self.bottom + 34, along, "middle") + (
            text(self.left - 7, self.top - 9, up, "start") if up else ""
        )


WHOLE = Axes(left=46, top=26, right=WIDTH - 14, bottom=HEIGHT - 42, along=(0.0, 1.0))


def reliability(calibration: Calibration) -> str:
    """Accuracy against confidence; the larger a circle, the larger its share of the pairs."""
    axes = Axes(WHOLE.left, WHOLE.top, WHOLE.right, WHOLE.bottom, along=(0.5, 1.0))
    points = [(axes.x(bin_.confidence), axes.y(bin_.right)) for bin_ in calibration.bins]
    circles = "".join(
        f'<circle class="a" cx="{x:.1f}" cy="{y:.1f}" r="{2.5 + 10 * math.sqrt(bin_.share):.1f}">'
        f"<title>confidence {bin_.confidence:.3f}, right {bin_.right:.3f}, {bin_.pairs:,} pairs</title></circle>"
        for (x, y), bin_ in zip(points, calibration.bins, strict=True)
    )
    body = (
        axes.across((0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
        + axes.upward((0, 0.25, 0.5, 0.75, 1))
        + line(axes.x(0.5), axes.y(0.5), axes.x(1), axes.y(1), "chance")
        + f'<polyline class="a thin" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
        + circles
        + axes.named("confidence", "share right")
        + line(axes.right - 148, 12, axes.right - 126, 12, "chance")
        + text(axes.right - 119, 16, "perfectly calibrated", "start")
    )
    return svg(f"Reliability, calibration error {calibration.ece:.3f}", body)


def histogram(scores: Distribution) -> str:
    """Scores of better answers (filled) and of worse ones (outline), with the bounds."""
    low, high = scores.edges[0], scores.edges[-1]
    if scores.bound is not None:
        low, high = min(low, -scores.bound), max(high, scores.bound)
    pad = 0.03 * (high - low) or 1.0
    most = max(*scores.better_counts, *scores.worse_counts)
    axes = Axes(
        WHOLE.left,
        WHOLE.top + 14,
        WHOLE.right,
        WHOLE.bottom,
        along=(low - pad, high + pad),
        up=(0, 1.05 * most),
    )
    bounds = "" if scores.bound is None else _bounds(axes, scores.bound)
    body = (
        axes.across(ticks(low, high))
        + axes.upward(ticks(0, most, 4), "{:,.0f}")
        + f'<path class="a area" d="{_steps(axes, scores.edges, scores.better_counts)}Z"/>'
        + f'<path class="b line" d="{_steps(axes, scores.edges, scores.worse_counts)}"/>'
        + bounds
        + axes.named("score, number of answers upward")
        + key(axes.right - 196, "a area", "better")
        + key(axes.right - 96, "b line", "worse")
    )
    return svg("Scores of better and worse answers", body)


def length_curve(curve: Sequence[LengthBin]) -> str:
    """Mean score against length, over bins of about equally many answers."""
    tokens, scores = [max(1.0, bin_.tokens) for bin_ in curve], [bin_.score for bin_ in curve]
    is_wide = max(tokens) > 12 * min(tokens)
    place = (lambda value: math.log2(value)) if is_wide else (lambda value: value)
    margin = 0.12 * (max(scores) - min(scores)) or 0.5
    ends = place(min(tokens)), place(max(tokens))
    pad = 0.05 * (ends[1] - ends[0]) or 1.0
    up = (min(scores) - margin, max(scores) + margin)
    axes = Axes(WHOLE.left, WHOLE.top, WHOLE.right, WHOLE.bottom, along=(ends[0] - pad, ends[1] + pad), up=up)
    marked = (
        [2.0**power for power in range(math.ceil(ends[0]), math.floor(ends[1]) + 1)]
        if is_wide
        else ticks(*ends)
    )
    marks = "".join(
        line(axes.x(place(tick)), axes.top, axes.x(place(tick)), axes.bottom, "grid")
        + text(axes.x(place(tick)), axes.bottom + 16, f"{tick:,.0f}", "middle")
        for tick in marked
    )
    points = [(axes.x(place(at)), axes.y(score)) for at, score in zip(tokens, scores, strict=True)]
    circles = "".join(
        f'<circle class="a" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>about {bin_.tokens:,.0f} tokens: mean score '
        f"{bin_.score:.3f}, {bin_.answers:,} answers</title></circle>"
        for (x, y), bin_ in zip(points, curve, strict=True)
    )
    body = (
        marks
        + axes.upward(ticks(*up, 5))
        + f'<polyline class="a thin" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
        + circles
        + axes.named("length of the answer in tokens" + (", doubling" if is_wide else ""), "mean score")
    )
    return svg("Mean score by length of the answer", body)


def accuracy_bars(title: str, rows: Sequence[tuple[str, Accuracy, float | None]]) -> str:
    """(name, accuracy, share of twins both right) as bars with 95% intervals and a line at chance."""
    with_twins = any(twins is not None for _, _, twins in rows)
    step = BAR + GAP + (BAR - 3 if with_twins else 0)
    height = 70 + step * len(rows) + 18 * with_twins
    axes = Axes(left=148, top=26 + 18 * with_twins, right=WIDTH - 52, bottom=height - 40, along=(0.0, 1.0))
    bars = "".join(_bar(axes, axes.top + 8 + index * step, *row) for index, row in enumerate(rows))
    legend = key(axes.left, "a area", "accuracy") + key(axes.left + 100, "b line", "twins both right")
    body = (
        axes.across((0, 0.25, 0.5, 0.75, 1))
        + bars
        + line(axes.x(0.5), axes.top, axes.x(0.5), axes.bottom, "chance")
        + text(axes.x(0.5), axes.top - 6, "chance", "middle")
        + (legend if with_twins else "")
        + axes.named("share right, with 95% interval")
    )
    return svg(title, body, height)


def _bar(axes: Axes, top: float, name: str, accuracy: Accuracy, twins: float | None) -> str:
    middle = top + BAR / 2
    low, high = axes.x(accuracy.low), axes.x(accuracy.high)
    tooltip = (
        f"{name}: {accuracy.value:.3f}, {accuracy.low:.3f} to {accuracy.high:.3f}, {accuracy.rows:,} rows"
    )
    drawn = (
        f"<g><title>{safe(tooltip)}</title>"
        + text(axes.left - 9, middle + 4, shortened(name), "end")
        + f'<rect class="a area" x="{axes.left}" y="{top:.1f}" width="{axes.x(accuracy.value) - axes.left:.1f}" '
        f'height="{BAR}"/>'
        + line(low, middle, high, middle, "whisker")
        + "".join(line(x, middle - 4, x, middle + 4, "whisker") for x in (low, high))
        + text(axes.right + 8, middle + 4, f"{accuracy.value:.3f}", "start")
        + "</g>"
    )
    if twins is not None:
        width, below = axes.x(twins) - axes.left, top + BAR
        drawn += f'<rect class="b line" x="{axes.left}" y="{below}" width="{width:.1f}" height="{BAR - 6}"/>'
        drawn += text(axes.right + 8, below + 10, f"{twins:.3f}", "start")
    return drawn


def _bounds(axes: Axes, bound: float) -> str:
    return "".join(
        line(axes.x(side), axes.top, axes.x(side), axes.bottom, "chance")
        + text(axes.x(side), axes.top - 5, f"bound {_figure(side, '{:+g}')}", "start" if side < 0 else "end")
        for side in (-bound, bound)
    )


def _steps(axes: Axes, edges: Sequence[float], counts: Sequence[int]) -> str:
    """A path over the tops of a histogram's bins, from the axis back to the axis."""
    path = [f"M{axes.x(edges[0]):.1f},{axes.bottom:.1f}"]
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        path.append(f"V{axes.y(count):.1f}H{axes.x(right):.1f}" if right > left else "")
    return "".join([*path, f"V{axes.bottom:.1f}"])


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Up to about `most` round values from low to high."""
    rough = (high - low) / most
    if rough <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [number * step for number in range(first, last + 1)]


def key(x: float, kind: str, name: str) -> str:
    """A swatch of a class of the style sheet with its name, above the plot."""
    return f'<rect class="{kind}" x="{x:.1f}" y="6" width="22" height="11"/>' + text(
        x + 29, 16, name, "start"
    )


def shortened(name: str, most: int = LABEL) -> str:
    """A name of at most so many characters: by default one that fits beside a bar."""
    name = printable(name)  # as it is drawn, so that its length is known
    return name if len(name) <= most else name[: most - 1] + "…"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{safe(text)}</text>'


def _figure(value: float, shown: str) -> str:
    return shown.format(value).replace("-", "−")


def svg(title: str, body: str, height: float = HEIGHT) -> str:
    return (
        f"<figure><figcaption>{safe(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{safe(title)}">{body}</svg></figure>'
    )
