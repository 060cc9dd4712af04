"""Histograms of scores, the grid of suspicious rows, and the page: what they show, and that nothing can break out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from robust_train.poisoning.records import Column, Decisions, summary, write_decisions, write_report
from robust_train.report.filtering import filter_page, page_from_folder, score_histogram, suspicious_grid
from robust_train.report.histogram import histogram

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "<script>alert(1)</script> \" ' & ]]> \x00\x1b\ud800 ünïcödé 漢字 <a href='javascript:x'>"
AXIS = {"title": "t", "x_label": "x"}


def parse(svg):
    return ElementTree.fromstring(svg)  # noqa: S314


def texts(svg):
    return [element.text for element in parse(svg).iter(f"{SVG}text")]


def bars(svg):
    """What the tooltips say: name, count and bin of every bar."""
    return [e.text for rect in parse(svg).iter(f"{SVG}rect") for e in rect.iter(f"{SVG}title")]


def column(name="spectral", n=200, **calibration):
    scores = np.linspace(0, 1, n)
    return Column(name, scores, 0.895, scores > 0.895, calibration)


def decided(*columns, n=200):
    columns = columns or (column(n=n),)
    decision = np.where(columns[0].flagged, "quarantine", "keep")
    decision[:5] = "downweight"
    weights = np.where(decision == "quarantine", 0.0, np.where(decision == "keep", 1.0, 0.5))
    return Decisions(np.arange(n) % 4, None, columns, decision, weights)


class Page(HTMLParser):
    """Tags, attributes and text of an HTML document."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words += [data.strip()] if data.strip() else []

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


# --- histogram ------------------------------------------------------------------------------------------------------


def test_bars_count_every_value_once():
    svg = histogram([("all", np.array([0, 0.1, 0.1, 1.0])), ("some", np.array([1.0]))], bins=10, **AXIS)
    assert bars(svg) == [
        "all: 1 from 0 to 0.1",
        "all: 2 from 0.1 to 0.2",
        "all: 1 from 0.9 to 1",
        "some: 1 from 0.9 to 1",
    ]
    assert {"all (4)", "some (1)", "x", "rows"} <= set(texts(svg))


def test_heights_are_in_proportion_unless_counts_differ_by_much():
    def heights(svg):
        return [float(e.get("height")) for e in parse(svg).iter(f"{SVG}rect") if e.find(f"{SVG}title") is not None]

    even = histogram([("a", np.array([0.0] * 10 + [1.0] * 5))], **AXIS)
    assert heights(even)[0] == pytest.approx(2 * heights(even)[1], abs=0.1)
    uneven = histogram([("a", np.array([0.0] * 999)), ("b", np.array([1.0] * 9))], **AXIS)
    assert "counts on a logarithmic axis" in texts(uneven)
    assert heights(uneven)[0] == pytest.approx(3 * heights(uneven)[1], abs=0.1)


def test_a_few_far_values_do_not_squeeze_the_others():
    values = np.append(np.random.default_rng(0).normal(size=999), 1e6)
    svg = histogram([("a", values)], **AXIS)
    assert "1 beyond the right end are counted there" in " ".join(t for t in texts(svg) if t)
    assert sum(int(b.split()[1]) for b in bars(svg)) == 1000
    assert len(bars(svg)) > 20


def test_marks_and_outlines_are_drawn():
    svg = histogram([("a", [0.0, 1.0])], outlines=[("planted", [2.0, 2.0])], marks=[(5.0, "here")], **AXIS)
    assert {"here", "planted"} <= set(texts(svg))
    assert svg.count("<polyline") == 1


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-2.0] * 5, [1e-300, 2e-300], [1.7e308, -1.7e308], [5e-324]])
def test_degenerate_values_are_drawn(values):
    svg = histogram([("a", np.array(values))], **AXIS)
    assert sum(int(b.split()[1]) for b in bars(svg)) == len(values)


def test_nothing_to_draw_is_an_error():
    for groups in ([], [("a", np.zeros(0))], [("a", np.array([np.nan]))]):
        with pytest.raises(ValueError, match="needs finite values, and at least one"):
            histogram(groups, **AXIS)
    with pytest.raises(ValueError, match="needs finite values"):
        histogram([("a", np.ones(1))], marks=[(np.inf, "m")], **AXIS)


def test_the_scores_of_a_filter_with_its_threshold():
    svg = score_histogram(column(), canaries=[0.8, 0.9, 1.2])
    assert {"Scores of spectral", "threshold 0.895", "all rows (200)", "flagged (21)", "canaries (3)"} <= set(
        texts(svg)
    )
    without = score_histogram(replace(column(), threshold=None, flagged=np.zeros(200, dtype=bool)))
    assert not any("threshold" in t for t in texts(without))


# --- grid -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_shows_every_picture(channels):
    images = np.random.default_rng(0).random((11, channels, 5, 7))
    captions = [f"class {i}\nrow {i}" for i in range(11)]
    svg = suspicious_grid(images, captions, out=[i == 0 for i in range(11)])
    root = parse(svg)
    assert len(list(root.iter(f"{SVG}image"))) == 11
    assert all(e.get("href").startswith("data:image/png;base64,") for e in root.iter(f"{SVG}image"))
    assert {"class 10", "row 10"} <= set(texts(svg))
    assert svg.count('stroke="#c94f00"') == 1


def test_a_grid_that_does_not_fit_is_refused():
    images = np.zeros((2, 1, 4, 4))
    for pictures, captions, out in ((images, ["a"], None), (images[:0], [], None), (images, ["a", "b"], [True])):
        with pytest.raises(ValueError, match="needs a caption for each picture"):
            suspicious_grid(pictures, captions, out=out)
    with pytest.raises(ValueError, match="values in"):
        suspicious_grid(images + 2, ["a", "b"])


# --- page -----------------------------------------------------------------------------------------------------------


def test_the_page_says_what_happened():
    calibration = {"method": "label canaries", "expected_fpr": 0.0123, "power": 0.9, "note": "36 canaries"}
    groups = {"method": "training without the groups", "groups": [{"flagged": True}, {"flagged": False}]}
    page = Page(filter_page(decided(column(**calibration), column("ac", **groups), column("knn")), {}))
    assert "179 of 200 training rows are used (89.5 %): 21 quarantined, 5 drawn less often." in page.text
    assert "spectral 21 10.50 % 0.895 label canaries 36 canaries 1.23 % 90 %" in page.text
    assert "training without the groups 1 of 2 groups flagged. unknown unknown" in page.text
    assert "knn 21 10.50 % 0.895 not calibrated unknown unknown" in page.text
    assert "0 50 43 2 5 0 14.0 %" in page.text
    assert page.tags.count("svg") == 3
    assert page.tags.count("details") == 3


def test_a_page_where_nothing_was_found():
    clean = replace(column(), flagged=np.zeros(200, dtype=bool), threshold=None)
    every = Decisions(np.zeros(200, dtype=int), None, (clean,), np.full(200, "keep"), np.ones(200))
    page = Page(filter_page(every, {}))
    assert "All 200 training rows are used; no filter led to a change." in page.text
    assert "spectral 0 0.00 % none" in page.text
    assert "All 200" in filter_page(replace(every, columns=()), {})


def test_the_page_adds_up_the_expected_false_alarms():
    two = decided(column(expected_fpr=0.01), column("other", expected_fpr=0.004))
    assert (
        "at most about 1.4 % are expected to be left out by the thresholds together" in Page(filter_page(two, {})).text
    )
    assert "thresholds together" not in filter_page(decided(), {})


def test_no_text_can_break_out_of_the_page():
    nasty = column(method=NASTY, note=NASTY, expected_fpr=NASTY, power=[NASTY], canary_scores=[0.5, NASTY, None])
    report = {"notes": [NASTY, 7], "pictures": {"rows": [0]}, "title": NASTY}
    html = filter_page(decided(nasty), report, np.zeros((1, 1, 8, 8), dtype=np.uint8))
    html.encode("utf-8")
    page = Page(html)
    assert not {"script", "a", "iframe", "link"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("data:") for name, value in page.attributes if name in ("href", "src"))
    assert page.text.count("<script>alert(1)</script>") == 3
    assert "default-src 'none'" in html


def test_the_page_refers_to_nothing_outside():
    html = filter_page(decided(), {"pictures": {"rows": [0]}}, np.zeros((1, 3, 8, 8), dtype=np.uint8))
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert "url(" not in html


def test_captions_name_the_filter_that_flagged_the_row():
    rare = Column("rare", np.eye(1, 200, 3)[0] * 7, None, np.zeros(200, dtype=bool))
    pictures = np.zeros((2, 1, 8, 8), dtype=np.uint8)
    page = Page(filter_page(decided(column(), rare), {"pictures": {"rows": [199, 3]}}, pictures))
    for words in ("class 3", "row 199", "1 spectral", "quarantine", "row 3", "7 rare"):
        assert words in page.words


def test_pictures_with_other_channels_are_shown_in_grey():
    html = filter_page(decided(), {"pictures": {"rows": [7]}}, np.zeros((1, 5, 8, 8), dtype=np.uint8))
    assert "<image" in html


@pytest.mark.parametrize(
    ("about", "pictures", "says"),
    [
        ({}, np.zeros((1, 1, 8, 8), np.uint8), "pictures.rows of the report must be"),
        ({"rows": [200]}, np.zeros((1, 1, 8, 8), np.uint8), "pictures.rows of the report must be"),
        ({"rows": ["x"]}, np.zeros((1, 1, 8, 8), np.uint8), "pictures.rows of the report must be"),
        ({"rows": [1, 2]}, np.zeros((1, 1, 8, 8), np.uint8), "with one for each of 2 pictures.rows"),
        ({"rows": [1]}, np.zeros((1, 1, 8, 8), np.float32), "pictures must be uint8"),
        ({"rows": [1]}, np.zeros((1, 8, 8), np.uint8), "pictures must be uint8"),
        ({"rows": []}, np.zeros((0, 1, 8, 8), np.uint8), "pictures must be uint8"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(about, pictures, says):
    with pytest.raises(ValueError, match=says):
        filter_page(decided(), {"pictures": about}, pictures)


def test_many_classes_are_cut_to_the_most_affected():
    rows = Decisions(
        np.arange(200), None, (column(),), np.where(np.arange(200) == 77, "drop", "keep"), (np.arange(200) != 77) * 1.0
    )
    page = Page(filter_page(rows, {}))
    assert "77 1 0 0 0 1 100.0 %" in page.text
    assert "170 more are in filter_report.json" in page.text


# --- a run's folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    made = decided(column(method="label canaries", canary_scores=[0.5, 0.7]))
    write_decisions(tmp_path / "filter_decisions.csv", made)
    write_report(tmp_path / "filter_report.json", {**summary(made, 4), "pictures": {"rows": [199, 198]}})
    np.save(tmp_path / "filter_suspicious.npy", np.zeros((2, 1, 8, 8), dtype=np.uint8))
    return tmp_path


def test_the_page_of_a_folder_is_the_page_of_what_was_written(folder):
    made = decided(column(method="label canaries", canary_scores=[0.5, 0.7]))
    pictures = np.zeros((2, 1, 8, 8), dtype=np.uint8)
    html = page_from_folder(folder)
    assert html == filter_page(made, {"pictures": {"rows": [199, 198]}}, pictures)
    assert "label canaries" in html
    assert "canaries (2)" in html


def test_a_folder_without_pictures_has_a_page_too(folder):
    (folder / "filter_suspicious.npy").unlink()
    assert "<image" not in page_from_folder(folder)


def test_a_report_that_knows_other_filters_does_no_harm(folder):
    for filters in ([], {"spectral": 1}, {"spectral": {"calibration": []}}, {"other": {}}):
        write_report(folder / "filter_report.json", {"filters": filters, "pictures": {"rows": [1, 2]}})
        assert "not calibrated" in page_from_folder(folder)


def test_a_folder_that_is_wrong_is_refused_in_one_line(folder, monkeypatch):
    path = folder / "filter_suspicious.npy"
    whole = path.read_bytes()
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    pickled = path.read_bytes()
    claims = whole.replace(b"(2, 1, 8, 8)", b"(9999999, 9, 9, 9)".ljust(12))
    for content in (b"", b"x", whole[:-1], pickled, claims):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="filter_suspicious.npy: ") as caught:
            page_from_folder(folder)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    monkeypatch.setattr("robust_train.report.filtering.LARGEST", 10)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        page_from_folder(folder)
    path.unlink()
    (folder / "filter_report.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"filter_report.json: this is no report"):
        page_from_folder(folder)
    (folder / "filter_decisions.csv").unlink()
    with pytest.raises(ValueError, match=r"filter_decisions.csv: there is no such file"):
        page_from_folder(folder)


def test_drawing_needs_no_torch():
    code = "import sys, robust_train.report.filtering; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
