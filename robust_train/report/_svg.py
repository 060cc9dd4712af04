"""The few pieces of SVG that all drawings are put together from.

Everything a caller passes as text is escaped here and nowhere else. No scripts, no styles, no ids and no references to
anything outside the file: a drawing can stand in a page beside others, under a strict content security policy.
"""

import re
import struct
import zlib
from base64 import b64encode
from textwrap import wrap
from xml.sax.saxutils import escape, quoteattr

import numpy as np

INK = "#1f2328"
MUTED = "#5c6570"
RULE = "#e3e6ea"
PAPER = "#ffffff"

# After Okabe and Ito, told apart by readers with any colour vision, some darkened to be legible as text on white.
# Vermilion comes first and blue second: the usual pair is an unprotected model and a hardened one, and wrong and right
# predictions wear the same two.
WRONG, RIGHT = "#c94f00", "#0072b2"
PALETTE = (WRONG, RIGHT, "#009e73", "#b0558f", "#b97a00", "#3a9bd0", INK)

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"

# Whatever XML 1.0 has no way to write, not even escaped.
_UNWRITABLE = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_ROOT = re.compile(r'<svg xmlns="http://www\.w3\.org/2000/svg" width="(\d+)" height="(\d+)" ')


def clean(value: object) -> str:
    """The text of ``value`` on one line, without characters that XML cannot hold."""
    return " ".join(_UNWRITABLE.sub("\ufffd", str(value)).split())


def number(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def element(tag: str, content: str = "", **attributes: object) -> str:
    """An element; underscores in names become hyphens, floats are rounded, ``content`` must be SVG already.

    A value of ``None`` leaves its attribute out.
    """
    words = [tag]
    for name, value in attributes.items():
        if value is not None:
            written = number(value) if isinstance(value, float) else clean(value)
            words.append(f"{name.replace('_', '-')}={quoteattr(written)}")
    opening = " ".join(words)
    return f"<{opening}>{content}</{tag}>" if content else f"<{opening}/>"


def text(value: object, x: float, y: float, *, size: float = 12, fill: str = INK, **attributes: object) -> str:
    """A line of text whose baseline starts at ``x, y``."""
    return element("text", escape(clean(value)), x=float(x), y=float(y), font_size=size, fill=fill, **attributes)


def tooltip(value: object) -> str:
    """What a browser shows while the pointer rests on the element that holds this."""
    return element("title", escape(clean(value)))


def width_of(value: object, size: float) -> float:
    """About how wide the text is; there is no font to measure with. Errs on the wide side for Latin text."""
    words = clean(value)
    wide = sum(c > "\u2e80" or c in "mwMW@%" for c in words)
    narrow = sum(c in " -.,:;'|!/()[]fijlrt" for c in words)
    return (wide + 0.36 * narrow + 0.62 * (len(words) - wide - narrow)) * size


def shorten(value: object, width: float, size: float) -> str:
    """The text, cut with an ellipsis if it would be wider than ``width``."""
    full = clean(value)
    if width_of(full, size) <= width:
        return full
    kept = full[: int(width / (0.36 * size)) + 1]  # more would not fit even if all of it were narrow
    while kept and width_of(kept + "…", size) > width:
        kept = kept[:-1]
    return kept.rstrip() + "…"


def lines(value: object, width: float, size: float, limit: int) -> list[str]:
    """The text broken into at most ``limit`` lines of ``width``, the last one cut if need be."""
    broken = wrap(clean(value), max(1, int(width / (0.53 * size))))
    if len(broken) > limit:
        broken = [*broken[: limit - 1], shorten(" ".join(broken[limit - 1 :]), width, size)]
    return broken


def heading(title: str, subtitle: str, width: int, size: int = 16) -> tuple[str, int]:
    """Title and subtitle, and where they end."""
    top, parts = 20, []
    for line in lines(title, width - 64, size, limit=2):
        top += size + 4
        parts.append(text(line, 32, top, size=size, font_weight=600))
    for line in lines(subtitle, width - 64, 13, limit=3):
        top += 19
        parts.append(text(line, 32, top, size=13, fill=MUTED))
    return "".join(parts), top + 8


def drawing(width: int, height: int, label: object, body: str) -> str:
    """A whole SVG document on a white card, so that it reads the same on a light and on a dark page."""
    card = element("rect", width=width, height=height, rx=10, fill=PAPER)
    name = quoteattr(clean(label))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label={name} font-family="{FONT}">{card}{body}</svg>\n'
    )


def size_of(svg: str) -> tuple[int, int]:
    """Width and height of a document that :func:`drawing` made.

    Raises:
        ValueError: it does not begin as one; anything else could carry a script or a reference into the page.
    """
    match = _ROOT.match(svg)
    if match is None:
        raise ValueError(f"only drawings made in this package can be put on a page, not {svg[:40]!r}")
    return int(match[1]), int(match[2])


def nested(svg: str, x: float, y: float) -> str:
    """The document as an element at ``x, y`` of another."""
    return svg.rstrip().replace("<svg ", f'<svg x="{number(x)}" y="{number(y)}" ', 1)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file.

    Args:
        pixels: uint8, ``(H, W)`` for grey or ``(H, W, 3)`` for RGB.

    Reference:
        "Portable Network Graphics (PNG) Specification", W3C, sections 5 and 11.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    colour = 0 if pixels.ndim == 2 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    # Every row begins with a byte for its filter; 0 is none.
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))
    body = zlib.compress(rows.astype(np.uint8).tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def data_uri(pixels: np.ndarray) -> str:
    """The picture as an address that holds it."""
    return "data:image/png;base64," + b64encode(png(pixels)).decode()
