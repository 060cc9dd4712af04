"""Grids of pictures as SVG text: arrays in, text out, nothing else touched."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import _svg as svg


@dataclass(frozen=True, eq=False)
class Tile:
    """One picture of a grid.

    Args:
        image: floats in [0, 1], shape ``(H, W)`` or ``(1, H, W)`` for grey, ``(3, H, W)`` for RGB. Numpy arrays, CPU
            tensors and nested lists will do.
        caption: a few words beneath it, such as the class predicted.
        correct: colours the frame and caption as right or wrong and adds a tick or a cross; ``None`` leaves them plain.

    Raises:
        ValueError: the shape is another, or a value is not finite or not in [0, 1].
    """

    image: object
    caption: str = ""
    correct: bool | None = None

    def __post_init__(self) -> None:
        image = np.asarray(self.image, dtype=float)
        channels_first = image.ndim == 3 and image.shape[0] in (1, 3)
        if not (image.ndim == 2 or channels_first) or image.size == 0:
            raise ValueError(f"an image must have shape (H, W), (1, H, W) or (3, H, W), got {image.shape}")
        # NaN fails this comparison too. The tolerance is for rounding in whatever produced the image.
        if not (image.min() >= -1e-4 and image.max() <= 1 + 1e-4):
            raise ValueError(f"an image must hold values in [0, 1], got {image.min():.4g} to {image.max():.4g}")

    def pixels(self) -> np.ndarray:
        """uint8, ``(H, W)`` or ``(H, W, 3)``."""
        image = np.asarray(self.image, dtype=float)
        if image.ndim == 3:
            image = image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)
        return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def diverging(values: object, limit: float) -> np.ndarray:
    """Colour signed values: blue below zero, white at zero, vermilion above. For perturbations.

    Args:
        values: shape ``(H, W)`` or ``(C, H, W)``, whose channels are averaged.
        limit: magnitude at which the colour is full, such as eps; > 0.

    Returns:
        RGB floats in [0, 1], shape ``(3, H, W)``.
    """
    if not limit > 0:
        raise ValueError(f"limit must be > 0, got {limit}")
    signed = np.asarray(values, dtype=float)
    signed = (signed.mean(axis=0) if signed.ndim == 3 else signed).clip(-limit, limit) / limit
    below, above = (np.array([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for c in (svg.RIGHT, svg.WRONG))
    ends = np.where(signed[None] < 0, below[:, None, None], above[:, None, None])
    return 1 - np.abs(signed) * (1 - ends)


def image_grid(
    rows: Sequence[Sequence[Tile | None]],
    *,
    title: str,
    subtitle: str = "",
    row_labels: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    tile: int = 72,
) -> str:
    """Pictures in rows and columns, each pixel shown as a square.

    Args:
        rows: the pictures; ``None`` leaves a place empty.
        title: what the grid shows, above it.
        subtitle: one or two lines beneath the title.
        row_labels: a label for each row, to its left; a line break separates it from a note set smaller.
        column_titles: a heading for each column, such as the true class.
        tile: side of a picture in pixels; pictures that are not square keep their shape.

    Returns:
        An SVG document.

    Raises:
        ValueError: there are no pictures, rows differ in length, or labels do not match them in number.
    """
    columns = len(rows[0]) if rows else 0
    if not columns:
        raise ValueError(f"grid {title!r} has no pictures to draw")
    if any(len(row) != columns for row in rows):
        raise ValueError(f"grid {title!r}: rows differ in length: {[len(row) for row in rows]}")
    if row_labels and len(row_labels) != len(rows):
        raise ValueError(f"grid {title!r}: {len(rows)} rows but {len(row_labels)} row_labels")
    if column_titles and len(column_titles) != columns:
        raise ValueError(f"grid {title!r}: {columns} columns but {len(column_titles)} column_titles")

    gap, margin = 14, 32
    label_width = 142 if row_labels else 0
    left = margin + label_width
    width = max(left + columns * (tile + gap) - gap + margin, 360)
    head, top = svg.heading(title, subtitle, width)
    body = [head]
    if column_titles:
        top += 12
        for column, heading in enumerate(column_titles):
            x = left + column * (tile + gap) + tile / 2
            words = svg.shorten(heading, tile + gap - 4, 12)
            body.append(svg.text(words, x, top + 6, fill=svg.MUTED, text_anchor="middle"))
    top += 16

    for index, row in enumerate(rows):
        if row_labels:
            body.append(_row_label(row_labels[index], margin, top + tile / 2, label_width - 16))
        body += [_tile(t, left + c * (tile + gap), top, tile, gap) for c, t in enumerate(row) if t is not None]
        captioned = any(t is not None and t.caption for t in row)
        top += tile + (34 if captioned else gap)
    return svg.drawing(width, top - gap + margin - 4, title, "".join(body))


def _row_label(label: str, x: float, middle: float, width: float) -> str:
    first, _, note = str(label).partition("\n")
    words = [(line, 13, svg.INK) for line in svg.lines(first, width, 13, limit=3)]
    words += [(line, 11, svg.MUTED) for line in svg.lines(note, width, 11, limit=3)]
    y = middle - 8.5 * len(words) - 3
    return "".join(
        svg.text(line, x, y + 17 * (i + 1), size=size, fill=fill) for i, (line, size, fill) in enumerate(words)
    )


def _tile(tile: Tile, x: float, y: float, side: int, gap: int) -> str:
    colour = {None: svg.MUTED, True: svg.RIGHT, False: svg.WRONG}[tile.correct]
    frame = svg.RULE if tile.correct is None else colour
    picture = svg.element(
        "image",
        svg.tooltip(tile.caption) if tile.caption else "",
        href=svg.data_uri(tile.pixels()),
        x=float(x),
        y=float(y),
        width=side,
        height=side,
        image_rendering="pixelated",
    )
    # Just outside the picture, so that no pixel is covered.
    border = svg.element(
        "rect", x=x - 1.5, y=y - 1.5, width=side + 3, height=side + 3, rx=2, fill="none", stroke=frame, stroke_width=2
    )
    if not tile.caption:
        return border + picture
    room = side + gap - 4 - (16 if tile.correct is not None else 0)
    words = svg.shorten(tile.caption, room, 12)
    middle, base = x + side / 2, y + side + 18
    sign = ""
    if tile.correct is not None:
        start = middle - (svg.width_of(words, 12) + 14) / 2
        outline = "M0 -4l3 3l6 -7" if tile.correct else "M1 -8l7 7m0 -7l-7 7"
        sign = svg.element(
            "path",
            d=outline,
            transform=f"translate({svg.number(start)} {svg.number(base)})",
            fill="none",
            stroke=colour,
            stroke_width=1.8,
            stroke_linecap="round",
        )
        middle += 7
    return border + picture + sign + svg.text(words, middle, base, fill=colour, text_anchor="middle")
