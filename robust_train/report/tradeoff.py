"""Many results side by side: which of them no other dominates, a drawing, and tables as Markdown, CSV and HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import _svg as svg
from .charts import _format, _Plot, _ticks

RADIUS = 5.5
LABEL = 11  # size of a label's letters
WIDEST = 260  # pixels of a label, at most
LABELLED = 200  # points for whose label a place is sought; where there are more, the paper is full long before
TINY = 1e-12  # no axis is divided finer around 0
PLAIN = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")  # a number; no spreadsheet takes it for a formula

Box = tuple[float, float, float, float]  # left, top, right, bottom


def pareto_front(values: Sequence[Sequence[float]]) -> list[bool]:
    """Which rows are dominated by no other.

    A row dominates another if it is at least as good in everything and better in something.

    Args:
        values: ``N`` rows of numbers, more is better; infinities are allowed.

    Returns:
        ``N`` verdicts; of equal rows all are on the front, or none.

    Raises:
        ValueError: a value is NaN, or rows differ in length.

    Guarantees:
        A row is on the front if and only if none dominates it, in whatever order they come.
    """
    if not len(values):
        return []
    if len({len(row) for row in values}) > 1:
        raise ValueError("all rows need as many values")
    rows = np.asarray(values, dtype=float)
    if np.isnan(rows).any():
        raise ValueError("NaN is neither better nor worse than a number")
    return [not bool(((rows >= row).all(1) & (rows > row).any(1)).any()) for row in rows]


@dataclass(frozen=True)
class Point:
    """One result.

    Args:
        name: everything there is to say of it; shown while the pointer rests on it.
        label: short words beside it, left out where there is no room.
        x: position.
        y: position.
        x_spread: half the length of an error bar; None: there is none.
        y_spread: of the other.
        mark: words that follow the label, and stand alone where there is no room for both, such as ``ε = 3.0``.
        front: no other result is better.

    Raises:
        ValueError: a number is not finite, or a spread is negative.
    """

    name: str
    label: str
    x: float
    y: float
    x_spread: float | None = None
    y_spread: float | None = None
    mark: str = ""
    front: bool = False

    def __post_init__(self) -> None:
        numbers = (self.x, self.y, self.x_spread or 0.0, self.y_spread or 0.0)
        if not all(map(math.isfinite, numbers)) or min(numbers[2:]) < 0:
            raise ValueError(f"point {self.name!r} needs finite positions and spreads >= 0, got {numbers}")


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    subtitle: str = "",
    percent: bool = True,
    lower_is_better: bool = False,
    width: int = 800,
    height: int = 520,
) -> str:
    """Points with error bars; those on the front are filled, the others hollow.

    A step line joins those on the front that no other on it beats in ``x`` and ``y`` alone.

    Args:
        points: the results, in any order.
        title: what is shown, above it.
        x_label: name of the horizontal axis.
        y_label: of the vertical one.
        subtitle: a line or two beneath the title.
        percent: values are shares of 0 to 1, shown as 0 % to 100 %.
        lower_is_better: values are losses; else more is better.
        width: in pixels.
        height: in pixels; grows with long headings.

    Returns:
        An SVG document.

    Raises:
        ValueError: there are no points, or a share is not within 0 to 1.

    Guarantees:
        Labels lie within the axes, and cover neither one another nor a point nor an error bar.
    """
    if not points:
        raise ValueError(f"scatter plot {title!r} has no points")
    if percent and not all(0 <= value <= 1 for p in points for value in (p.x, p.y)):
        raise ValueError(f"scatter plot {title!r}: shares must be 0 to 1; for other values set percent=False")
    order = sorted(points, key=lambda p: (not p.front, p.x, p.y, p.name))  # first come, first labelled
    head, top = svg.heading(title, subtitle, width)
    legend, top = _legend(top)
    plot = _Plot(
        x_ticks=_span([(p.x, p.x_spread or 0.0) for p in points], percent, about=7),
        y_ticks=_span([(p.y, p.y_spread or 0.0) for p in points], percent, about=6),
        left=94,
        top=top + 14,
        right=width - 40,
        bottom=max(height, top + 300) - 58,
    )
    better = -1.0 if lower_is_better else 1.0
    front = [(p.x, p.y) for p in order if p.front]
    outer = pareto_front([(better * x, better * y) for x, y in front])
    corners = _steps(sorted({place for place, on in zip(front, outer, strict=True) if on}), lower_is_better)
    path = [(plot.x(x), plot.y(y)) for x, y in corners]
    bars = [bar for p in order for bar in _bars(plot, p, percent)]

    body = [svg.tooltip(title), head, legend, _axes(plot, x_label, y_label, percent)]
    if len(path) > 1:
        line = " ".join(f"{svg.number(x)},{svg.number(y)}" for x, y in path)
        body.append(svg.element("polyline", points=line, fill="none", stroke=svg.RIGHT, stroke_dasharray="5 4"))
    body += [svg.element("line", x1=a, y1=b, x2=c, y2=d, stroke=svg.MUTED, stroke_width=1.2) for a, b, c, d in bars]
    body += [_dot(plot.x(p.x), plot.y(p.y), p.front, p.name) for p in reversed(order)]  # those on the front on top
    taken = [_around(plot.x(p.x), plot.y(p.y)) for p in order]
    taken += [(a - 2, b - 2, c + 2, d + 2) for a, b, c, d in bars]
    taken += [(min(a, c), min(b, d), max(a, c), max(b, d)) for (a, b), (c, d) in zip(path, path[1:], strict=False)]
    body += _labels(plot, order[:LABELLED], taken)
    return svg.drawing(width, int(plot.bottom) + 58, title, "".join(body))


def _span(values: Sequence[tuple[float, float]], percent: bool, about: int) -> list[float]:
    """Ticks around all values with their spreads and a margin for labels; shares stay within 0 to 1."""
    low, high = min(v - s for v, s in values), max(v + s for v, s in values)
    low, high = (0.0 if abs(v) < TINY else float(f"{v:.9g}") for v in (low, high))
    size = max(abs(low), abs(high)) or 1.0
    margin = max(0.08 * (high - low), 0.01 if percent else 1e-6 * size if high > low else 0.1 * size)
    low, high = low - margin, high + margin
    return _ticks([max(low, 0.0), min(high, 1.0)] if percent else [low, high], about)


def _steps(corners: Sequence[tuple[float, float]], lower_is_better: bool) -> list[tuple[float, float]]:
    """The border of what the points dominate, from left to right; each point lies lower than the one before it."""
    out = list(corners[:1])
    for (x1, y1), (x2, y2) in zip(corners, corners[1:], strict=False):
        out += [(x2, y1) if lower_is_better else (x1, y2), (x2, y2)]
    return out


def _bars(plot: _Plot, point: Point, percent: bool) -> list[Box]:
    """Error bars as lines, cut off at 0 and 1 where values are shares."""
    x, y = plot.x(point.x), plot.y(point.y)

    def ends(centre: float, spread: float) -> tuple[float, float]:
        low, high = centre - spread, centre + spread
        return (max(low, 0.0), min(high, 1.0)) if percent else (low, high)

    out = []
    if point.x_spread:
        low, high = ends(point.x, point.x_spread)
        out.append((plot.x(low), y, plot.x(high), y))
    if point.y_spread:
        low, high = ends(point.y, point.y_spread)
        out.append((x, plot.y(high), x, plot.y(low)))
    return out


def _axes(plot: _Plot, x_label: str, y_label: str, percent: bool) -> str:
    parts = []
    for tick in plot.x_ticks:
        x = plot.x(tick)
        parts.append(svg.element("line", x1=x, x2=x, y1=plot.top, y2=plot.bottom, stroke=svg.RULE))
        parts.append(svg.text(_format(tick, percent), x, plot.bottom + 20, fill=svg.MUTED, text_anchor="middle"))
    for tick in plot.y_ticks:
        y = plot.y(tick)
        parts.append(svg.element("line", x1=plot.left, x2=plot.right, y1=y, y2=y, stroke=svg.RULE))
        parts.append(svg.text(_format(tick, percent), plot.left - 10, y + 4, fill=svg.MUTED, text_anchor="end"))
    across, down = (plot.left + plot.right) / 2, (plot.top + plot.bottom) / 2
    parts.append(svg.text(x_label, across, plot.bottom + 42, size=13, text_anchor="middle"))
    turned = f"translate(32 {svg.number(down)}) rotate(-90)"
    parts.append(svg.text(y_label, 0, 0, size=13, text_anchor="middle", transform=turned))
    return "".join(parts)


def _legend(top: int) -> tuple[str, int]:
    y = top + 16
    return (
        _dot(38, y - 4, True)
        + svg.text("on the Pareto front", 50, y, size=13)
        + _dot(204, y - 4, False)
        + svg.text("not on the front", 216, y, size=13)
        + svg.element("line", x1=344, x2=372, y1=y - 4, y2=y - 4, stroke=svg.RIGHT, stroke_dasharray="5 4")
        + svg.text("front of these two axes", 380, y, size=13)
    ), y + 4


def _dot(x: float, y: float, front: bool, says: str = "") -> str:
    return svg.element(
        "circle",
        svg.tooltip(says) if says else "",
        cx=float(x),
        cy=float(y),
        r=RADIUS,
        fill=svg.RIGHT if front else svg.PAPER,
        stroke=svg.PAPER if front else svg.MUTED,
        stroke_width=1.5 if front else 2,
    )


def _around(x: float, y: float) -> Box:
    reach = RADIUS + 1.5
    return x - reach, y - reach, x + reach, y + reach


def _labels(plot: _Plot, points: Sequence[Point], taken: list[Box]) -> list[str]:
    """Each point's words at the first of eight places around it that is free; none where there is no such place."""
    out = []
    for point in points:
        x, y = plot.x(point.x), plot.y(point.y)
        label = svg.shorten(point.label, WIDEST, LABEL) if point.label else ""
        full = ", ".join(words for words in (label, point.mark) if words)
        for words in dict.fromkeys(words for words in (full, point.mark) if words):
            if (box := _free(plot, x, y, svg.width_of(words, LABEL) + 4, taken)) is not None:
                taken.append(box)
                out.append(svg.text(words, box[0] + 2, box[3] - 4, size=LABEL))
                break
    return out


def _free(plot: _Plot, x: float, y: float, width: float, taken: Sequence[Box]) -> Box | None:
    gap, tall = RADIUS + 3, LABEL + 4
    right, left, middle = x + gap, x - gap - width, x - width / 2
    above, below, beside = y - gap - tall, y + gap, y - tall / 2
    corners = [(right, beside), (left, beside), (middle, above), (middle, below)]
    corners += [(right, above + gap / 2), (right, below - gap / 2), (left, above + gap / 2), (left, below - gap / 2)]
    others = np.asarray(taken, dtype=float).reshape(-1, 4)
    for a, b in corners:
        c, d = a + width, b + tall
        inside = plot.left <= a and c <= plot.right and plot.top <= b and d <= plot.bottom
        meets = (others[:, 0] < c) & (others[:, 2] > a) & (others[:, 1] < d) & (others[:, 3] > b)
        if inside and not meets.any():
            return a, b, c, d
    return None
