import re
import struct
import subprocess
import sys
import zlib
from base64 import b64decode
from xml.etree import ElementTree

import numpy as np
import pytest

from robust_train.report import Series, Tile, diverging, image_grid, line_chart, page
from robust_train.report._svg import png, shorten, width_of

SVG = "{http://www.w3.org/2000/svg}"
AXES = {"x_label": "eps", "y_label": "accuracy"}
NASTY = "<script>alert(1)</script> \" ' & ]]> \x00\x1b\ud800 ünïcödé 漢字 <a href='javascript:x'>"


def chart(*series, **settings):
    return line_chart(series or [Series("standard", [0, 0.1], [1, 0.2])], **{"title": "t", **AXES, **settings})


def parse(svg):
    return ElementTree.fromstring(svg)  # noqa: S314


def texts(svg):
    return [element.text for element in parse(svg).iter(f"{SVG}text")]


def unpack(data):
    """Read a PNG back: header fields and rows without their filter bytes."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, rest = {}, data[8:]
    while rest:
        length, kind = struct.unpack(">I4s", rest[:8])
        body = rest[8 : 8 + length]
        assert struct.unpack(">I", rest[8 + length : 12 + length]) == (zlib.crc32(kind + body),)
        chunks[kind], rest = body, rest[12 + length :]
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(height, -1)
    assert depth == 8
    assert not rows[:, 0].any()
    shape = (height, width) if colour == 0 else (height, width, 3)
    return rows[:, 1:].reshape(shape)


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (5, 9), (4, 6, 3)])
def test_png_holds_the_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(unpack(png(pixels)), pixels)


def test_a_chart_draws_every_point_where_it_belongs():
    svg = chart(Series("a", [0, 1, 2], [0, 0.5, 1]), Series("b", np.array([0, 2]), np.array([1, 1])), percent=True)
    root = parse(svg)
    first, second = (
        [tuple(map(float, p.split(","))) for p in e.get("points").split()] for e in root.iter(f"{SVG}polyline")
    )
    assert len(first) == 3
    assert len(second) == 2
    (x0, y0), (x1, y1), (x2, y2) = first
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.02)
    assert y0 > y2
    assert second[0] == (x0, y2)
    shown = texts(svg)
    assert {"a", "b", "eps", "accuracy", "0%", "100%"} <= set(shown)
    assert "a: 50% at eps 1" in [e.text for e in root.iter(f"{SVG}title")]


def test_bands_and_marks_are_drawn():
    plain = chart()
    banded = chart(Series("s", [0, 1], [0.5, 0.6], low=[0.4, 0.5], high=[0.6, 0.7]), marks=[(0.5, "trained against")])
    assert "<polygon" not in plain
    assert banded.count("<polygon") == 1
    assert "trained against" in texts(banded)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([0.3], [0.3]),
        ([0, 0], [0, 0]),
        ([-1e300, 1e300], [1e-300, 2e-300]),
        ([1e16, 1e16 + 2], [1, 2]),
        (range(2000), range(2000)),
        ([-5, -3], [3, -1]),
    ],
    ids=["one point", "zero", "huge and tiny", "nearly equal", "many", "negative"],
)
def test_axes_span_whatever_finite_numbers_come(x, y):
    svg = chart(Series("s", x, y))
    numbers = re.search(r'<polyline points="([^"]*)"', svg)[1].replace(",", " ").split()
    assert all(0 <= float(n) <= 880 for n in numbers)


def test_ticks_are_round():
    shown = texts(chart(Series("s", [0, 8 / 255], [0.03, 0.97])))
    assert {"0.005", "0.035", "0.2", "0.8"} <= set(shown)
    assert {"0.1", "0.4", "0.9"} <= set(texts(chart(Series("s", [0, 1], [0.2, 0.8]), y_range=(0.1, 0.9))))


def test_a_long_legend_makes_the_chart_taller_and_not_the_lines_flatter():
    tall = chart(*[Series(f"a model with quite a long name, number {i}", [0, 1], [0, 1]) for i in range(12)], width=400)
    assert int(parse(tall).get("height")) > 420


def test_a_grid_shows_each_picture_with_its_caption():
    rng = np.random.default_rng(0)
    images = [rng.random((8, 8)), rng.random((1, 8, 8)), rng.random((3, 4, 6))]
    svg = image_grid(
        [[Tile(images[0], "seven", True), Tile(images[1], "one", False)], [Tile(images[2]), None]],
        title="Examples",
        row_labels=["clean\nnote", "attacked"],
        column_titles=["digit 7", "digit 1"],
    )
    root = parse(svg)
    pictures = [
        unpack(b64decode(e.get("href").removeprefix("data:image/png;base64,"))) for e in root.iter(f"{SVG}image")
    ]
    np.testing.assert_array_equal(pictures[0], np.rint(images[0] * 255))
    np.testing.assert_array_equal(pictures[1], np.rint(images[1][0] * 255))
    np.testing.assert_array_equal(pictures[2], np.rint(np.moveaxis(images[2], 0, -1) * 255))
    assert all(e.get("image-rendering") == "pixelated" for e in root.iter(f"{SVG}image"))
    assert {"seven", "one", "clean", "note", "attacked", "digit 7", "digit 1"} <= set(texts(svg))
    fills = {e.text: e.get("fill") for e in root.iter(f"{SVG}text")}
    assert fills["seven"] != fills["one"]


def test_diverging_is_white_at_zero_and_full_at_the_limit():
    colours = diverging(np.array([[0.0, 0.2, -0.2, 5.0, -0.1]]), limit=0.2)
    assert colours.shape == (3, 1, 5)
    np.testing.assert_array_equal(colours[:, 0, 0], 1)
    np.testing.assert_array_equal(colours[:, 0, 1], colours[:, 0, 3])
    assert colours[0, 0, 1] > colours[2, 0, 1]
    assert colours[0, 0, 2] < colours[2, 0, 2]
    np.testing.assert_allclose(colours[:, 0, 4], (1 + colours[:, 0, 2]) / 2)
    Tile(diverging(np.full((3, 2, 2), -0.1), limit=0.1))


def test_a_page_stacks_its_parts_without_overlap():
    parts = [chart(title="first"), image_grid([[Tile([[0.5]])]], title="second"), chart(title="third", height=500)]
    svg = page(parts, title="All of it", footer="seed 0\ntorch 2.13")
    root = parse(svg)
    inner = root.findall(f"{SVG}svg")
    assert len(inner) == 3
    edges = [(float(e.get("y")), float(e.get("y")) + int(e.get("height"))) for e in inner]
    assert all(end <= start for (_, end), (start, _) in zip(edges, edges[1:], strict=False))
    assert edges[-1][1] < int(root.get("height"))
    assert int(root.get("width")) == max(int(e.get("width")) for e in inner)
    assert {"All of it", "first", "second", "third", "seed 0", "torch 2.13"} <= set(texts(svg))
    assert not re.search(r'\bid="', svg)


def everything(words):
    series = [Series(words, [0, 1], [0, 1], low=[0, 0.5], high=[0.5, 1])]
    names = {"title": words, "subtitle": words}
    a = line_chart(series, x_label=words, y_label=words, marks=[(0.5, words)], **names)
    b = image_grid([[Tile([[0.0]], words, True)]], row_labels=[words + "\n" + words], column_titles=[words], **names)
    return [a, b, page([a, b], footer=words + "\n" + words, **names)]


@pytest.mark.parametrize(
    "words", [NASTY, "x" * 5000, "", "\n", "%s {} \\1"], ids=["nasty", "long", "empty", "line", "format"]
)
def test_text_stays_text(words):
    for svg in everything(words):
        svg.encode("utf-8")
        root = parse(svg)
        used = {element.tag.removeprefix(SVG) for element in root.iter()}
        assert used <= {"svg", "g", "rect", "line", "polyline", "polygon", "path", "text", "title", "image"}
        for element in root.iter():
            assert not any(name.startswith("on") or name == "style" for name in element.attrib)
            assert element.get("href", "data:image/png;base64,").startswith("data:image/png;base64,")


def test_text_is_escaped_and_not_dropped():
    assert "<b>&\"'" in texts(chart(Series("<b>&\"'", [0], [0])))


def test_shorten_keeps_to_the_width():
    assert shorten("pullover", 100, 12) == "pullover"
    cut = shorten("a rather long caption", 60, 12)
    assert cut.endswith("…")
    assert width_of(cut, 12) <= 60


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda: Series("s", [], []), "no points"),
        (lambda: Series("s", [0, 1], [0]), "2 values of x but 1 of y"),
        (lambda: Series("s", [0], [float("nan")]), "not finite"),
        (lambda: Series("s", [float("inf")], [0]), "not finite"),
        (lambda: Series("s", [0], [0], low=[0]), "both low and high"),
        (lambda: Series("s", [0], [0], low=[1], high=[0]), "low must not exceed high"),
        (lambda: Series("s", [0], [0], low=[0], high=[float("nan")]), "not finite"),
        (lambda: line_chart([], title="t", **AXES), "no series"),
        (lambda: chart(marks=[(float("nan"), "here")]), "finite x"),
        (lambda: chart(Series("s", [0], [1.2]), percent=True), "outside y_range"),
        (lambda: chart(y_range=(1, 0)), "outside y_range"),
        (lambda: chart(Series("s", [0], [1]), y_range=(1, 1)), "axis must run"),
        (lambda: chart(Series("s", [-1.7e308, 1.7e308], [0, 1])), "axis must run"),
        (lambda: Tile(np.zeros((2, 3, 3))), "must have shape"),
        (lambda: Tile(np.zeros((0, 3))), "must have shape"),
        (lambda: Tile(np.full((2, 2), np.nan)), r"in \[0, 1\]"),
        (lambda: Tile(np.full((2, 2), 255.0)), r"in \[0, 1\]"),
        (lambda: diverging(np.zeros((2, 2)), limit=0), "limit must be"),
        (lambda: image_grid([], title="t"), "no pictures"),
        (lambda: image_grid([[]], title="t"), "no pictures"),
        (lambda: image_grid([[None], [None, None]], title="t"), "differ in length"),
        (lambda: image_grid([[None]], title="t", row_labels=["a", "b"]), "2 row_labels"),
        (lambda: image_grid([[None]], title="t", column_titles=["a", "b"]), "2 column_titles"),
        (lambda: page([], title="t"), "no parts"),
        (lambda: page(["<svg onload='x'/>"], title="t"), "only drawings made"),
    ],
)
def test_what_cannot_be_drawn_is_refused(attempt, says):
    with pytest.raises(ValueError, match=says):
        attempt()


def test_drawings_are_the_same_every_time():
    assert everything("a") == everything("a")


def test_reporting_needs_neither_torch_nor_lightning():
    code = "import sys, robust_train.report; assert not {'torch', 'pytorch_lightning', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
