"""Histograms as SVG text: numbers in, text out, nothing else touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import _svg as svg
from .charts import _mark, _Plot, _ticks

BINS = 60
MANY = 20  # times as high as another group is the highest bar, before counts are drawn on a logarithmic axis
SQUEEZED = 4  # times wider than the middle 99 % of the values is the whole: then the ends are cut off, and say so
TINY, HUGE = 1e-300, 1e300  # no axis can be divided below and above

Groups = Sequence[tuple[str, np.ndarray]]


def histogram(
    groups: Groups,
    *,
    title: str,
    x_label: str,
    y_label: str = "rows",
    subtitle: str = "",
    outlines: Groups = (),
    marks: Sequence[tuple[float, str]] = (),
    bins: int = BINS,
    width: int = 880,
    height: int = 320,
) -> str:
    """Counts of values in bins of equal width. Bars of all groups stand on the axis, the later ones in front.

    Counts that differ by much are shown on a logarithmic axis, which begins at 0. A few values far from all others are
    counted in the first or last bin, which the subtitle then says.

    Args:
        groups: name and values ``(N,)`` of each. Bars of a later group cover those of an earlier one: let it be a part
            of that one, or lie elsewhere.
        title: what is shown, above it.
        x_label: name of the horizontal axis.
        y_label: of the vertical one.
        subtitle: a line or two beneath the title.
        outlines: further groups, drawn as lines in front of the bars.
        marks: ``(x, label)`` for each vertical guide, such as a threshold.
        bins: how many, >= 1.
        width: in pixels.
        height: in pixels.

    Returns:
        An SVG document.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    every = np.concatenate([np.asarray(values, dtype=float) for _, values in (*groups, *outlines)] or [np.zeros(0)])
    places = np.array([x for x, _ in marks], dtype=float)
    if not every.size or not np.isfinite(every).all() or not np.isfinite(places).all():
        raise ValueError(f"histogram {title!r} needs finite values, and at least one")
    low, high = _range(every.clip(-HUGE, HUGE), places.clip(-HUGE, HUGE))
    beyond = int((every < low).sum()), int((every > high).sum())
    notes = [
        f"{n} beyond the {side} end are counted there" for n, side in zip(beyond, ("left", "right"), strict=True) if n
    ]
    edges = np.linspace(low, high, bins + 1)
    counts = [np.histogram(np.clip(values, low, high), edges)[0] for _, values in (*groups, *outlines)]

    fullest = max(int(n.max()) for n in counts)
    logarithmic = fullest > MANY * min(int(n.max()) for n in counts if n.any())
    if logarithmic:
        notes.append("counts on a logarithmic axis")
    head, top = svg.heading(title, ". ".join(t for t in (subtitle, "; ".join(notes)) if t), width)
    legend, top = _legend([(name, len(values)) for name, values in groups], [n for n, _ in outlines], top, width)
    y_ticks = _count_ticks(fullest, logarithmic)
    plot = _Plot(
        x_ticks=[low, high],
        y_ticks=[_height(tick, logarithmic) for tick in y_ticks],
        left=94,
        top=top + (34 if marks else 16),
        right=width - 40,
        bottom=max(height, top + 180) - 58,
    )
    body = [head, legend, _axes(plot, y_ticks, x_label, y_label)]
    for index, (name, _) in enumerate(groups):
        body += _bars(plot, edges, counts[index], name, _colour(index), logarithmic)
    for index, (name, _) in enumerate(outlines, start=len(groups)):
        body.append(_outline(plot, edges, counts[index], name, _colour(index), logarithmic))
    body += [_mark(plot, x, label, width) for x, label in marks]
    return svg.drawing(width, int(plot.bottom) + 58, title, "".join(body))


def _range(values: np.ndarray, places: np.ndarray) -> tuple[float, float]:
    """Ends of the axis: of all values, but for a few that lie far from the others; marks lie within."""
    inner = np.concatenate([np.quantile(values, (0.005, 0.995)), places])
    wide = float(inner.max() - inner.min())
    low, high = float(values.min()), float(values.max())
    if 0 < SQUEEZED * wide < high - low:
        low, high = max(low, float(inner.min()) - wide / 2), min(high, float(inner.max()) + wide / 2)
    low, high = min([low, *places.tolist()]), max([high, *places.tolist()])
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or size < TINY:
        half = size / 2 if size >= TINY else 0.5
        return low - half, high + half
    return low, high


def _height(count: float, logarithmic: bool) -> float:
    return float(np.log10(1 + count)) if logarithmic else float(count)


def _count_ticks(fullest: int, logarithmic: bool) -> list[float]:
    """Whole numbers from 0 to at least the largest count."""
    if logarithmic:
        return [0, *(10.0**power for power in range(int(np.ceil(np.log10(fullest))) + 1))]
    return _ticks([0, fullest], about=min(4, fullest))


def _colour(index: int) -> str:
    """Blue for what is usual, vermilion for what stands out, then the rest of the palette."""
    return (svg.RIGHT, svg.WRONG, *svg.PALETTE[2:])[index % len(svg.PALETTE)]


def _axes(plot: _Plot, y_ticks: list[float], x_label: str, y_label: str) -> str:
    parts = []
    for tick, place in zip(y_ticks, plot.y_ticks, strict=True):
        y = plot.y(place)
        parts.append(svg.element("line", x1=plot.left, x2=plot.right, y1=y, y2=y, stroke=svg.RULE))
        parts.append(svg.text(f"{tick:,.0f}", plot.left - 10, y + 4, fill=svg.MUTED, text_anchor="end"))
    low, high = plot.x_ticks
    for tick in _ticks([low, high], about=8):
        if low <= tick <= high:
            x = plot.x(tick)
            parts.append(svg.element("line", x1=x, x2=x, y1=plot.bottom, y2=plot.bottom + 5, stroke=svg.MUTED))
            parts.append(svg.text(f"{tick:.6g}", x, plot.bottom + 20, fill=svg.MUTED, text_anchor="middle"))
    parts.append(svg.element("line", x1=plot.left, x2=plot.right, y1=plot.bottom, y2=plot.bottom, stroke=svg.MUTED))
    across, down = (plot.left + plot.right) / 2, (plot.top + plot.bottom) / 2
    below = svg.shorten(x_label, plot.right - plot.left, 13)
    parts.append(svg.text(below, across, plot.bottom + 42, size=13, text_anchor="middle"))
    turned = f"translate(42 {svg.number(down)}) rotate(-90)"
    beside = svg.shorten(y_label, plot.bottom - plot.top, 13)
    parts.append(svg.text(beside, 0, 0, size=13, text_anchor="middle", transform=turned))
    return "".join(parts)


def _bars(plot: _Plot, edges: np.ndarray, counts: np.ndarray, name: str, colour: str, logarithmic: bool) -> list[str]:
    bars = []
    for left, right, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True):
        if count:
            x, y = plot.x(left), plot.y(_height(count, logarithmic))
            says = svg.tooltip(f"{name}: {count} from {left:.4g} to {right:.4g}")
            wide = max(plot.x(right) - x - 1, 0.5)
            bars.append(svg.element("rect", says, x=x, y=y, width=wide, height=plot.bottom - y, fill=colour))
    return bars


def _outline(plot: _Plot, edges: np.ndarray, counts: np.ndarray, name: str, colour: str, logarithmic: bool) -> str:
    levels = [plot.y(_height(count, logarithmic)) for count in counts.tolist()]
    steps = [(edges[0], plot.bottom)]
    for left, right, y in zip(edges[:-1], edges[1:], levels, strict=True):
        steps += [(left, y), (right, y)]
    points = [*steps, (edges[-1], plot.bottom)]
    written = " ".join(f"{svg.number(plot.x(x))},{svg.number(y)}" for x, y in points)
    return svg.element(
        "polyline",
        svg.tooltip(name),
        points=written,
        fill="none",
        stroke=colour,
        stroke_width=2,
        stroke_linejoin="round",
    )


def _legend(bars: Sequence[tuple[str, int]], lines: Sequence[str], top: int, width: int) -> tuple[str, int]:
    """A sample of each group with its name, in one row, and where it ends."""
    parts, x, y = [], 32.0, top + 16
    for index, full in enumerate([*(f"{name} ({count:,})" for name, count in bars), *lines]):
        name = svg.shorten(full, width / (len(bars) + len(lines)) - 60, 13)
        if index < len(bars):
            parts.append(svg.element("rect", x=x, y=y - 6, width=14, height=12, rx=2, fill=_colour(index)))
        else:
            parts.append(svg.element("line", x1=x, x2=x + 14, y1=y, y2=y, stroke=_colour(index), stroke_width=2))
        parts.append(svg.text(name, x + 22, y + 4.5, size=13))
        x += 22 + svg.width_of(name, 13) + 18
    return "".join(parts), y + 8
