"""Plots of the signs of over-optimization, as SVG for a page with the rules of `STYLE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tuner.display.plots import WIDTH, Axes, line, shortened, svg, text, ticks
from tuner.evaluation.intervals import Interval
from tuner.evaluation.over_optimization.report import OverOptimization
from tuner.evaluation.over_optimization.scaling_law import Law, Point
from tuner.printable import safe

COLORS = 5
"""Series that have a color of their own; further ones begin again with the first."""
CURVE_POINTS = 80

Series = Sequence[tuple[float, float]]


def gold_over_distance(rounds: Sequence[OverOptimization], law: Law | None) -> str:
    """Gold score of every step against its distance from the reference, with the law and where it turns."""
    return _over_distance(
        "Gold score over the distance from the reference", rounds, lambda point: point.gold, law
    )


def score_over_distance(rounds: Sequence[OverOptimization]) -> str:
    """The score that is trained on, on the same axis."""
    return _over_distance("Score over the distance from the reference", rounds, lambda point: point.score)


def golds_by_step(signs: OverOptimization) -> str:
    """Gold score of all answers of a rollout, and of its best-scored tenth, by step; empty without gold scores."""
    series = {
        "all answers": [(float(point.step), point.gold) for point in signs.points],
        "best-scored tenth": [(float(step), gold) for step, gold in signs.golds_of_best],
    }
    return _by_step("Gold score by step", "gold score", {name: line for name, line in series.items() if line})


def phrases_by_step(signs: OverOptimization) -> str:
    """Share of the recorded answers that hold each growing phrase, by step; empty without such phrases."""
    series = {
        course.phrase.text: [(float(step), share) for step, share in course.shares]
        for course in signs.phrases
    }
    return _by_step("Phrases that grow", "share of the recorded answers", series)


def _over_distance(
    title: str,
    rounds: Sequence[OverOptimization],
    value: Callable[[Point], float],
    law: Law | None = None,
) -> str:
    points = [point for signs in rounds for point in signs.points]
    if len(points) < 2:
        return ""
    farthest = max(point.distance for point in points)
    turns = [] if law is None else [turn for signs in rounds if (turn := _turn(law, signs)) is not None]
    reach = max([farthest, *(min(turn.value, 1.5 * farthest) for turn in turns)]) * 1.04 or 1.0
    curves = [] if law is None else [_curve(law, number, reach) for number in _round_numbers(rounds)]
    drawn = [value(point) for point in points] + [gold for curve in curves for _, gold in curve]
    axes = _axes((0.0, reach), _padded(min(drawn), max(drawn)), keys=len(rounds) > 1)
    body = (
        axes.across(ticks(0.0, reach))
        + axes.upward(ticks(*axes.up, 5))
        + "".join(_turning_point(axes, turn) for turn in turns)
        + "".join(
            _polyline(axes, curve, number - 1)
            for curve, number in zip(curves, _round_numbers(rounds), strict=False)
        )
        + "".join(_dot(axes, point, value(point)) for point in points)
        + axes.named("√KL from the reference, KL in nats per answer")
    )
    if len(rounds) > 1:
        body += _keys(axes, [f"round {number}" for number in _round_numbers(rounds)])
    return svg(title, body, axes.bottom + 42)


def _by_step(title: str, up: str, series: Mapping[str, Series]) -> str:
    steps = [step for values in series.values() for step, _ in values]
    if len(set(steps)) < 2:
        return ""
    highest = max(value for values in series.values() for _, value in values)
    axes = _axes((min(steps), max(steps)), (0.0, min(1.02, 1.1 * highest) or 1.0), keys=len(series))
    body = (
        axes.across(ticks(*axes.along), "{:,.0f}")
        + axes.upward(ticks(*axes.up, 5))
        + "".join(_polyline(axes, values, number) for number, values in enumerate(series.values()))
        + axes.named(f"step; upward: {up}")
        + _keys(axes, list(series))
    )
    return svg(title, body, axes.bottom + 42)


def _axes(along: tuple[float, float], up: tuple[float, float], keys: int) -> Axes:
    """Room for the keys above: two in a row."""
    top = 14 + 20 * -(-keys // 2)
    return Axes(left=52, top=top, right=WIDTH - 14, bottom=top + 226, along=along, up=up)


def _keys(axes: Axes, names: Sequence[str]) -> str:
    drawn = ""
    for number, name in enumerate(names):
        x, y = axes.left + 226 * (number % 2), 14 + 20 * (number // 2)
        drawn += f"<g><title>{safe(name)}</title>"
        drawn += line(x, y - 4, x + 22, y - 4, f"series s{number % COLORS}")
        drawn += text(x + 29, y, shortened(name, 27), "start") + "</g>"
    return drawn


def _polyline(axes: Axes, values: Series, number: int) -> str:
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in values)
    return f'<polyline class="series s{number % COLORS}" points="{path}"/>'


def _dot(axes: Axes, point: Point, value: float) -> str:
    shown = (
        f"step {point.step:,}: distance {point.distance:.2f}, gold {point.gold:.3f}, score {point.score:.3f}"
    )
    return (
        f'<circle class="dot s{(point.round - 1) % COLORS}" cx="{axes.x(point.distance):.1f}" '
        f'cy="{axes.y(value):.1f}" r="3.6"><title>{safe(shown)}</title></circle>'
    )


def _turning_point(axes: Axes, turn: Interval) -> str:
    """A line where the gold score turns, on its interval as a band."""
    low, high = (min(max(value, axes.along[0]), axes.along[1]) for value in (turn.low, turn.high))
    x = axes.x(min(turn.value, axes.along[1]))
    return (
        f'<rect class="band" x="{axes.x(low):.1f}" y="{axes.top}" width="{axes.x(high) - axes.x(low):.1f}" '
        f'height="{axes.bottom - axes.top}"/>'
        + line(x, axes.top, x, axes.bottom, "chance")
        + text(x, axes.top - 4, f"turns at {turn.value:.2f}", "middle")
    )


def _turn(law: Law, signs: OverOptimization) -> Interval | None:
    return law.turning_point_of(signs.points[0].round) if signs.points else None


def _round_numbers(rounds: Sequence[OverOptimization]) -> list[int]:
    return [signs.points[0].round for signs in rounds if signs.points]


def _curve(law: Law, round_number: int, reach: float) -> list[tuple[float, float]]:
    distances = [reach * place / CURVE_POINTS for place in range(CURVE_POINTS + 1)]
    return [(distance, law.gold(distance, round_number)) for distance in distances]


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


STYLE = """
:root{--s0:#0072B2;--s1:#D55E00;--s2:#009E73;--s3:#8a5fbf;--s4:#7a7a20}
@media(prefers-color-scheme:dark){:root{--s0:#56B4E9;--s1:#E69F00;--s2:#3ecf9f;--s3:#c4a3ef;--s4:#d0d060}}
svg .series{fill:none;stroke-width:2;stroke-linejoin:round}
svg .dot{fill-opacity:.55;stroke-width:1}
svg .s0{stroke:var(--s0)}svg .s1{stroke:var(--s1);stroke-dasharray:7 3}svg .s2{stroke:var(--s2);stroke-dasharray:2 3}
svg .s3{stroke:var(--s3);stroke-dasharray:9 3 2 3}svg .s4{stroke:var(--s4);stroke-dasharray:4 4}
svg .dot.s0{fill:var(--s0)}svg .dot.s1{fill:var(--s1)}svg .dot.s2{fill:var(--s2)}svg .dot.s3{fill:var(--s3)}
svg .dot.s4{fill:var(--s4)}svg .dot{stroke-dasharray:none!important}
.verdict+p{margin-top:10px}.verdict+.plots,section+.plots{margin-top:14px}
svg .band{fill:var(--ink);opacity:.08}
"""
"""Rules of these plots, after those of `sheet.STYLE`. Series differ in dashes, too: color alone tells nothing apart."""
