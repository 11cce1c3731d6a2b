"""A noisy series as SVG, redrawn while a run trains: that costs a millisecond, with a plotting library hundreds."""

from tuner.printable import safe

POINTS_DRAWN = 300
"""Most points of a curve, evenly chosen: a notebook file stores what it displays."""
WIDTH, HEIGHT, MARGIN = 620, 200, 42
"""A curve's size in pixels; the margin holds the labels at the left and below."""
BLUE, ORANGE = "#0072B2", "#D55E00"

Point = tuple[float, float]


def curve(
    values: list[Point],
    means: list[Point],
    held_out: list[Point],
    name: str = "loss",
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """Every step's value faint, their mean, and held-out values as dots; empty before there are two points."""
    series = values or held_out
    if len(series) < 2:
        return ""
    shown, mean = thinned(values), thinned(means)
    drawn = [value for _, value in [*shown, *held_out]]
    low, high = min(drawn), max(drawn)
    first, last = series[0][0], series[-1][0]

    def place(point: Point) -> tuple[float, float]:
        x = MARGIN + (point[0] - first) / (last - first) * (width - MARGIN - 8)
        y = 8 + (high - point[1]) / ((high - low) or 1.0) * (height - 32)
        return x, y

    def line(points: list[Point], opacity: float, thickness: float, color: str = BLUE) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
        style = f'stroke="{color}" stroke-opacity="{opacity}" stroke-width="{thickness}"'
        return f'<polyline points="{path}" fill="none" {style}/>'

    def dot(point: Point) -> str:
        x, y = place(point)
        title = f"<title>step {point[0]:,.0f}: {point[1]:.4f}</title>"
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{ORANGE}">{title}</circle>'

    lines = [line(shown, 0.3, 1.0), line(mean, 1.0, 2.0)] if values else [line(held_out, 1.0, 1.3, ORANGE)]
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" '
        f'aria-label="{safe(name)} against steps">'
        f"{_labels(low, high, first, last, width, height)}{''.join([*lines, *map(dot, held_out)])}</svg>"
    )


def _labels(low: float, high: float, first: float, last: float, width: int, height: int) -> str:
    bottom, right = height - 24, width - 8
    style = 'fill="currentColor" fill-opacity=".7" font-size="11" font-family="sans-serif"'
    rule = 'stroke="currentColor" stroke-opacity=".35"'
    return (
        f'<path d="M{MARGIN} 8V{bottom}H{right}" fill="none" {rule}/>'
        f'<text x="{MARGIN - 5}" y="14" text-anchor="end" {style}>{_label(high)}</text>'
        f'<text x="{MARGIN - 5}" y="{bottom}" text-anchor="end" {style}>{_label(low)}</text>'
        f'<text x="{MARGIN}" y="{height - 8}" {style}>{first:,.0f}</text>'
        f'<text x="{right}" y="{height - 8}" text-anchor="end" {style}>step {last:,.0f}</text>'
    )


def _label(value: float) -> str:
    """Three significant digits, or one where they would not fit in the margin."""
    text = f"{value:.3g}"
    return text if len(text) <= 8 else f"{value:.0e}"


def thinned(points: list[Point]) -> list[Point]:
    """At most POINTS_DRAWN of the points, evenly chosen, with the last."""
    stride = -(-len(points) // POINTS_DRAWN)
    # Counted from the end, so that the newest point is always drawn.
    return points[(len(points) - 1) % stride :: stride] if points else []
