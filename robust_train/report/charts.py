"""Line charts as SVG text: numbers in, text out, nothing else touched."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np

from . import _svg as svg


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        name: what the legend calls it.
        x: positions, drawn in this order.
        y: values, as many.
        low: lower edge of a band around the line (a confidence interval, say); needs ``high``.
        high: its upper edge.

    Raises:
        ValueError: nothing to draw, lengths that differ, a value that is not finite, or a band that is upside down.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.name!r}: a band needs both low and high")
        if len(self.x) == 0:
            raise ValueError(f"series {self.name!r} has no points")
        for label, values in (("x", self.x), ("y", self.y), ("low", self.low), ("high", self.high)):
            if values is None:
                continue
            if len(values) != len(self.x):
                raise ValueError(f"series {self.name!r}: {len(self.x)} values of x but {len(values)} of {label}")
            plain = tuple(float(v) for v in values)
            if not np.isfinite(plain).all():
                raise ValueError(f"series {self.name!r}: {label} holds a value that is not finite: {plain}")
            object.__setattr__(self, label, plain)
        if self.low is not None and self.high is not None and (np.asarray(self.low) > np.asarray(self.high)).any():
            raise ValueError(f"series {self.name!r}: low must not exceed high")


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    subtitle: str = "",
    percent: bool = False,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    width: int = 880,
    height: int = 420,
) -> str:
    """Named lines with markers over common axes.

    Args:
        series: the lines; colours and markers follow their order.
        title: what the chart shows, above it.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        subtitle: one or two lines beneath the title: what was measured, on how many examples.
        percent: show values of 0 to 1 as 0 % to 100 %.
        y_range: ends of the vertical axis; else from the data, or all of 0 to 1 where ``percent`` is set. Bands are cut
            off at them, values of ``y`` must lie between.
        marks: ``(x, label)`` for each vertical guide, such as the eps trained against.
        width: in pixels; the default is as wide as a grid of eight columns.
        height: in pixels; grows if a long legend leaves the lines too little.

    Returns:
        An SVG document.

    Raises:
        ValueError: there are no series, a number is not finite, or a value of ``y`` lies outside ``y_range``.
    """
    if not series:
        raise ValueError(f"chart {title!r} has no series to draw")
    if not np.isfinite([x for x, _ in marks]).all():
        raise ValueError(f"chart {title!r}: a mark is not at a finite x: {list(marks)}")
    if y_range is None and percent:
        y_range = (0.0, 1.0)
    if y_range is not None and not all(y_range[0] <= y <= y_range[1] for s in series for y in s.y):
        raise ValueError(f"chart {title!r}: a value lies outside y_range {y_range}")

    head, top = svg.heading(title, subtitle, width)
    legend, top = _legend([s.name for s in series], top, width)
    height = max(height, top + 240)
    plot = _Plot(
        x_ticks=_ticks([v for s in series for v in s.x] + [x for x, _ in marks], about=7),
        y_ticks=_ticks([v for s in series for part in (s.y, s.low or (), s.high or ()) for v in part], 5, y_range),
        left=94,
        top=top + (34 if marks else 16),
        right=width - 40,
        bottom=height - 58,
    )

    body = [head, legend, _axes(plot, x_label, y_label, percent)]
    body += [_mark(plot, x, label, width) for x, label in marks]
    body += [_band(plot, s, _colour(i)) for i, s in enumerate(series) if s.low is not None and s.high is not None]
    body += [_line(plot, s, i, x_label, percent) for i, s in enumerate(series)]
    return svg.drawing(width, height, title, "".join(body))


@dataclass(frozen=True)
class _Plot:
    """The rectangle that values are drawn in, and the ticks whose ends span it."""

    x_ticks: list[float]
    y_ticks: list[float]
    left: float
    top: float
    right: float
    bottom: float

    def x(self, value: float) -> float:
        first, last = self.x_ticks[0], self.x_ticks[-1]
        return self.left + (value - first) / (last - first) * (self.right - self.left)

    def y(self, value: float) -> float:
        first, last = self.y_ticks[0], self.y_ticks[-1]
        inside = min(max(value, first), last)
        return self.bottom - (inside - first) / (last - first) * (self.bottom - self.top)


def _ticks(values: Sequence[float], about: int, fixed: tuple[float, float] | None = None) -> list[float]:
    """Evenly spaced round numbers (1, 2 or 5 times a power of ten) that span the values, or the two ends given."""
    low, high = fixed if fixed is not None else (min(values), max(values))
    if fixed is None and high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    if not (np.isfinite(high - low) and low < high):
        raise ValueError(f"an axis must run from a lower to a higher finite number, got {low} to {high}")
    rough = (high - low) / about
    power = 10.0 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    ticks = [float(f"{i * step:.12g}") for i in range(first, last + 1)]
    return ticks if fixed is None else [low, *(t for t in ticks if low + step / 3 < t < high - step / 3), high]


def _format(value: float, percent: bool) -> str:
    return f"{value * 100:.4g}%" if percent else f"{value:.6g}"


def _colour(index: int) -> str:
    return svg.PALETTE[index % len(svg.PALETTE)]


def _legend(names: Sequence[str], top: int, width: int) -> tuple[str, int]:
    """A sample of each line with its name, in as many rows as that takes, and where they end."""
    parts, x, y = [], 32.0, top + 16
    for index, full in enumerate(names):
        name = svg.shorten(full, width - 110, 13)
        needed = 34 + svg.width_of(name, 13) + 18
        if x > 32 and x + needed > width - 32:
            x, y = 32.0, y + 22
        colour = _colour(index)
        parts.append(svg.element("line", x1=x, x2=x + 26, y1=y, y2=y, stroke=colour, stroke_width=2.5))
        parts.append(_marker(index, x + 13, y))
        parts.append(svg.text(name, x + 34, y + 4.5, size=13))
        x += needed
    return "".join(parts), y + 8


def _axes(plot: _Plot, x_label: str, y_label: str, percent: bool) -> str:
    parts = []
    for tick in plot.y_ticks:
        y = plot.y(tick)
        parts.append(svg.element("line", x1=plot.left, x2=plot.right, y1=y, y2=y, stroke=svg.RULE))
        parts.append(svg.text(_format(tick, percent), plot.left - 10, y + 4, fill=svg.MUTED, text_anchor="end"))
    for tick in plot.x_ticks:
        x = plot.x(tick)
        parts.append(svg.element("line", x1=x, x2=x, y1=plot.bottom, y2=plot.bottom + 5, stroke=svg.MUTED))
        parts.append(svg.text(_format(tick, False), x, plot.bottom + 20, fill=svg.MUTED, text_anchor="middle"))
    parts.append(svg.element("line", x1=plot.left, x2=plot.right, y1=plot.bottom, y2=plot.bottom, stroke=svg.MUTED))
    across, down = (plot.left + plot.right) / 2, (plot.top + plot.bottom) / 2
    below = svg.shorten(x_label, plot.right - plot.left, 13)
    beside = svg.shorten(y_label, plot.bottom - plot.top, 13)
    parts.append(svg.text(below, across, plot.bottom + 42, size=13, text_anchor="middle"))
    turned = f"translate(42 {svg.number(down)}) rotate(-90)"
    parts.append(svg.text(beside, 0, 0, size=13, text_anchor="middle", transform=turned))
    return "".join(parts)


def _mark(plot: _Plot, value: float, label: str, width: int) -> str:
    x = plot.x(value)
    words = svg.shorten(label, width / 2, 12)
    half = svg.width_of(words, 12) / 2
    centre = min(max(x, plot.left + half), plot.right - half)
    return svg.element(
        "line", x1=x, x2=x, y1=plot.top - 4, y2=plot.bottom, stroke=svg.MUTED, stroke_dasharray="3 4"
    ) + svg.text(words, centre, plot.top - 10, fill=svg.MUTED, text_anchor="middle")


def _band(plot: _Plot, series: Series, colour: str) -> str:
    upper = list(zip(series.x, series.high or (), strict=True))
    lower = list(zip(series.x, series.low or (), strict=True))
    return svg.element("polygon", points=_points(plot, upper + lower[::-1]), fill=colour, fill_opacity=0.14)


def _line(plot: _Plot, series: Series, index: int, x_label: str, percent: bool) -> str:
    pairs = list(zip(series.x, series.y, strict=True))
    parts = [
        svg.element(
            "polyline",
            points=_points(plot, pairs),
            fill="none",
            stroke=_colour(index),
            stroke_width=2.5,
            stroke_linejoin="round",
            stroke_linecap="round",
        )
    ]
    for x, y in pairs:
        says = svg.tooltip(f"{series.name}: {_format(y, percent)} at {x_label} {_format(x, False)}")
        parts.append(svg.element("g", says + _marker(index, plot.x(x), plot.y(y))))
    return "".join(parts)


def _points(plot: _Plot, pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{svg.number(plot.x(x))},{svg.number(plot.y(y))}" for x, y in pairs)


def _marker(index: int, x: float, y: float) -> str:
    """Circle, square, triangle, diamond: lines stay apart where colours do not, on a grey print for instance."""
    outlines = (
        "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
        "M-4 -4h8v8h-8z",
        "M0 -5.2l5 8.8h-10z",
        "M0 -5.6l5.6 5.6l-5.6 5.6l-5.6 -5.6z",
    )
    place = f"translate({svg.number(x)} {svg.number(y)})"
    return svg.element(
        "path",
        d=outlines[index % len(outlines)],
        transform=place,
        fill=_colour(index),
        stroke=svg.PAPER,
        stroke_width=1.5,
    )
