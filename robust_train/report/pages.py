"""Several drawings in one file."""

from collections.abc import Sequence

from . import _svg as svg


def page(parts: Sequence[str], *, title: str, subtitle: str = "", footer: str = "") -> str:
    """Put drawings under one another into one document.

    Args:
        parts: what :func:`~.charts.line_chart` and :func:`~.pictures.image_grid` returned.
        title: heading of the page.
        subtitle: a line or two beneath it.
        footer: small print at the end: versions, seeds, how to reproduce. May be several lines.

    Returns:
        An SVG document.

    Raises:
        ValueError: there are no parts, or one of them is not a drawing made here.
    """
    if not parts:
        raise ValueError(f"page {title!r} has no parts")
    sizes = [svg.size_of(part) for part in parts]
    width = max(w for w, _ in sizes)
    head, top = svg.heading(title, subtitle, width, size=22)
    body = [head]
    top += 10
    for part, (_, height) in zip(parts, sizes, strict=True):
        body.append(svg.element("line", x1=32, x2=width - 32, y1=top, y2=top, stroke=svg.RULE))
        body.append(svg.nested(part, 0, top + 2))
        top += height + 4
    small = [line for paragraph in footer.splitlines() for line in svg.lines(paragraph, width - 64, 11, limit=12)]
    if small:
        body.append(svg.element("line", x1=32, x2=width - 32, y1=top, y2=top, stroke=svg.RULE))
        body += [svg.text(line, 32, top + 24 + 16 * i, size=11, fill=svg.MUTED) for i, line in enumerate(small)]
        top += 24 + 16 * len(small)
    return svg.drawing(width, top + 12, title, "".join(body))
