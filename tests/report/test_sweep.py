"""Sweeps: what is read, how seeds are averaged, which rows are on the front, and that nothing can break out."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_train.report._svg import width_of
from robust_train.report.sweep import (
    Failed,
    Job,
    Sweep,
    read_sweep,
    shared_overrides,
    table,
)
from robust_train.report.sweep_page import as_csv, as_markdown, as_page, notes, short_label
from robust_train.report.tradeoff import Point, pareto_front, scatter

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "<script>alert(1)</script> \" ' & ]]> | \x00\x1b\ud800 ünïcödé 漢字 <a href='javascript:x'> {{ 7*7 }}"
AXES = {"title": "t", "x_label": "x", "y_label": "y"}
THREAT = "Linf ball of radius 0.2"


def job(folder="0", settings="recipe=pgd_at", seed=1, threat=THREAT, attacks=None, **metrics):
    metrics = metrics or {"clean_acc": 0.9, "robust_acc": 0.5}
    overrides = (*settings.split(), f"seed={seed}")
    return Job(folder, overrides, seed, threat, attacks or {"pgd": "PGD(steps=50)"}, metrics)


def sweep(*jobs, **others):
    return Sweep("sweep", jobs, **others)


def acc(clean, robust, **more):
    return {"clean_acc": clean, "robust_acc": robust, **more}


def write(folder, overrides=("recipe=pgd_at", "seed=1"), result=None, error=None, **changes):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/overrides.yaml").write_text("".join(f"- {text}\n" for text in overrides))
    if error is not None:
        (folder / "error.txt").write_text(error)
    if result is not None:
        content = {
            "recipe": "pgd_at",
            "overrides": list(overrides),
            "threat": THREAT,
            "seed": 1,
            "attacks": {"pgd": "PGD(steps=50)"},
            "results": {"standard": acc(1.0, 0.0), "pgd_at": {"train_seconds": 12.3, "curve": [[0, 0.9]], **result}},
        }
        (folder / "result.json").write_text(json.dumps({**content, **changes}))


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
        self.words.append(data)


def drawings(html):
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg .*?</svg>", html, re.S)]  # noqa: S314


# --- reading --------------------------------------------------------------------------------------------------------


def test_jobs_are_found_however_deep_and_in_the_order_of_their_numbers(tmp_path):
    for name in ("10", "2", "again/0"):
        write(tmp_path / name, result=acc(0.9, 0.5))
    found = read_sweep(tmp_path)
    assert [j.folder for j in found.jobs] == ["2", "10", "again/0"]
    assert found.name == tmp_path.name
    assert found.jobs[0].metrics == {"clean_acc": 0.9, "robust_acc": 0.5, "train_seconds": 12.3}  # the recipe's own


def test_a_job_without_a_result_is_told_with_its_reason(tmp_path):
    write(tmp_path / "0", error="no such data\n\nTraceback")
    write(tmp_path / "1", overrides=("recipe=trades",))
    found = read_sweep(tmp_path)
    assert found.unfinished[0] == Failed("0", "no such data", ("recipe=pgd_at", "seed=1"))
    assert "still running" in found.unfinished[1].reason
    for text in (as_markdown(found), as_page(found, "t")):
        assert "no such data" in text
        assert "recipe=trades" in text
        assert "Traceback" not in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting"),
        ('{"recipe": NaN}', "NaN"),
        ("[]", "no JSON object"),
        ("{}", "recipe, overrides, threat, attacks, results"),
        ("[" * 100_000, "nested"),
        ('{"recipe": "a", "overrides": [1], "threat": "", "attacks": {}, "results": {}}', "must be text"),
        ('{"recipe": "a", "overrides": [], "threat": "", "attacks": {}, "results": {"b": {}}}', "no entry"),
    ],
)
def test_a_broken_result_is_a_note_and_no_crash(tmp_path, content, reason):
    write(tmp_path / "0", result=acc(0.9, 0.5))
    write(tmp_path / "1")
    (tmp_path / "1/result.json").write_text(content)
    found = read_sweep(tmp_path)
    assert len(found.jobs) == 1
    assert reason in found.unreadable[0].reason
    assert "1 cannot be read" in as_markdown(found)
    assert "1 cannot be read" in as_page(found, "t")


@pytest.mark.parametrize(
    "metric",
    [{"clean_acc": 1.2}, {"clean_acc": True}, {"robust_acc_pgd": None}, {"epsilon": -1}, {"clean_loss": 1e200}]
    + [{"robust_acc": "0.5"}],
)
def test_what_is_no_measurement_is_not_read(tmp_path, metric):
    write(tmp_path / "0", result=metric)
    assert next(iter(metric)) in read_sweep(tmp_path).unreadable[0].reason


def test_large_files_and_links_are_not_read(tmp_path, monkeypatch):
    write(tmp_path / "elsewhere/0", result=acc(0.9, 0.5))
    (tmp_path / "sweep").mkdir()
    os.symlink(tmp_path / "elsewhere/0", tmp_path / "sweep/0")
    write(tmp_path / "sweep/1", result=acc(0.9, 0.5), versions=" " * 2000)
    monkeypatch.setattr("robust_train.report.sweep.LARGEST", 1000)
    found = read_sweep(tmp_path / "sweep")
    assert not found.jobs
    assert [(f.folder, f.reason[:9]) for f in found.unreadable] == [("0", "links are"), ("1", "the file ")]


def test_a_folder_without_jobs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no jobs"):
        read_sweep(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        read_sweep(tmp_path / "none")


# --- rows -----------------------------------------------------------------------------------------------------------


def test_seeds_are_averaged_whatever_the_order_of_overrides():
    rows = table(
        sweep(
            job("0", "recipe=pgd_at threat.eps=0.1", seed=0, **acc(0.8, 0.4)),
            job("1", "threat.eps=0.1 recipe=pgd_at", seed=1, **acc(0.9, 0.6)),
            job("2", "recipe=pgd_at threat.eps=0.2", seed=1),
        )
    )
    assert [dict(row.settings) for row in rows] == [{"threat.eps": "0.1"}, {"threat.eps": "0.2"}]
    assert rows[0].seeds == 2
    assert rows[0].metrics["robust_acc"].value == pytest.approx(0.5)
    assert rows[0].metrics["robust_acc"].spread == pytest.approx(math.sqrt(0.02))


def test_one_seed_has_no_spread():
    alone = sweep(job())
    assert table(alone)[0].metrics["clean_acc"].spread is None
    assert "90.0 % ± –" in as_markdown(alone)
    assert "90.0 % ± –" in as_page(alone, "t")
    assert next(csv.DictReader(io.StringIO(as_csv(alone))))["clean_acc_spread"] == ""


def test_what_all_jobs_share_stands_above_the_table():
    jobs = sweep(job("0", "data=digits a=1 hydra.sweep.dir=x"), job("1", "data=digits a=2 hydra/launcher=joblib"))
    assert shared_overrides(jobs) == ["data=digits", "hydra.sweep.dir=x", "hydra/launcher=joblib"]
    assert [dict(row.settings) for row in table(jobs)] == [{"a": "1"}, {"a": "2"}]
    assert "data=digits" in as_markdown(jobs).split("|")[0]
    assert "data=digits" not in as_markdown(jobs).split("|", 1)[1]


def test_rows_come_in_the_order_of_numbers():
    values = ["16/255", "0.03", "4/255", "8/255", "none", "1e999999999"]
    rows = table(sweep(*[job(str(i), f"threat.eps={v}") for i, v in enumerate(values)]))
    assert [row.settings["threat.eps"] for row in rows] == ["4/255", "0.03", "8/255", "16/255", "1e999999999", "none"]


def test_a_metric_that_some_seeds_lack_says_so():
    jobs = sweep(job("0", seed=0, **acc(0.9, 0.5, attack_success_rate=0.25)), job("1", seed=1, **acc(0.9, 0.5)))
    assert "25.0 % ± – (1 of 2 seeds)" in as_markdown(jobs)


def test_of_several_seeds_the_largest_epsilon_is_told_and_rounded_up():
    private = [job(str(i), seed=i, **acc(0.9, 0.5, epsilon=e, delta=1e-5)) for i, e in enumerate((2.0, 3.00001))]
    assert table(sweep(*private))[0].metrics["epsilon"].value == 3.00001
    assert "3.001" in as_markdown(sweep(*private))
    assert "δ = 1e-05" in as_markdown(sweep(*private))
    void = sweep(*private, job("2", seed=2, **acc(0.9, 0.5, epsilon=None)))
    assert table(void)[0].metrics["epsilon"].value is None
    assert not table(void)[0].front
    assert " void " in as_markdown(void)


def test_less_epsilon_is_worth_a_place_on_the_front_and_a_void_one_is_not():
    rows = table(
        sweep(
            job("0", "a=best", **acc(0.9, 0.5)),
            job("1", "a=private", **acc(0.8, 0.4, epsilon=3.0)),
            job("2", "a=looser", **acc(0.8, 0.4, epsilon=4.0)),
            job("3", "a=void", **acc(0.95, 0.6, epsilon=None)),
            job("4", "a=worse", **acc(0.8, 0.4)),
        )
    )
    assert {row.settings["a"] for row in rows if row.front} == {"best", "private"}


def test_a_row_of_which_one_seed_is_not_private_is_not_private():
    rows = table(
        sweep(
            job("0", "a=1", seed=0, **acc(0.8, 0.4, epsilon=3.0)),
            job("1", "a=1", seed=1, **acc(0.8, 0.4)),
            job("2", "a=2", **acc(0.9, 0.5)),
        )
    )
    assert [row.front for row in rows] == [False, True]


def test_rows_compete_only_where_threat_and_attacks_are_the_same():
    jobs = sweep(
        job("0", "a=1", **acc(0.9, 0.6)),
        job("1", "a=2", **acc(0.8, 0.5)),
        job("2", "a=3", threat="Linf ball of radius 0.3", **acc(0.8, 0.4)),
        job("3", "a=4", attacks={"fgsm": "FGSM()"}, **acc(0.8, 0.4)),
    )
    assert {row.settings["a"]: row.front for row in table(jobs)} == {"1": True, "2": False, "3": True, "4": True}
    text = as_markdown(jobs)
    assert "different attacks: fgsm: FGSM(); or pgd: PGD(steps=50)" in text
    assert "The threat differs" in text
    assert "| threat" in text
    assert len(drawings(as_page(jobs, "t"))) == 3


def test_of_losses_the_smaller_is_better():
    losses = [(0.1, 0.9), (0.2, 0.5), (0.3, 0.6)]
    jobs = sweep(*[job(str(i), f"a={i}", clean_loss=c, robust_loss=r) for i, (c, r) in enumerate(losses)])
    assert [row.front for row in table(jobs)] == [True, True, False]
    assert "less is better" in as_page(jobs, "t")


def test_a_seed_that_ran_twice_counts_once_and_is_told():
    jobs = sweep(job("10", seed=1, **acc(0.9, 0.5)), job("2", seed=1, **acc(0.1, 0.1)))
    assert table(jobs)[0].seeds == 1
    assert table(jobs)[0].metrics["clean_acc"].value == 0.9
    assert any(note.startswith("2 is left out") for note in notes(jobs))


MERITS = st.lists(st.tuples(*[st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, math.inf])] * 3), max_size=12)


def brute_force(values):
    front = []
    for a in values:
        beaten = False
        for b in values:
            beaten = beaten or (a != b and b[0] >= a[0] and b[1] >= a[1] and b[2] >= a[2])
        front.append(not beaten)
    return front


@settings(deadline=None)
@given(MERITS)
def test_the_front_is_what_brute_force_finds(values):
    assert pareto_front(values) == brute_force(values)


JOBS = st.lists(
    st.builds(
        lambda a, seed, clean, robust, epsilon: ((a, seed), acc(clean, robust, **epsilon)),
        st.integers(0, 4),
        st.integers(0, 2),
        st.floats(0, 1),
        st.floats(0, 1),
        st.sampled_from([{}, {"epsilon": None}, {"epsilon": 1.5}, {"epsilon": 3.0}]),
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=40)
@given(JOBS, st.randoms(use_true_random=False))
def test_the_order_of_jobs_changes_nothing_and_the_front_is_right(measured, random):
    jobs = [job(str(i), f"a={a} b=1", seed=seed, **metrics) for i, ((a, seed), metrics) in enumerate(measured)]
    mixed = random.sample(jobs, len(jobs))
    one, other = sweep(*jobs), sweep(*mixed)
    assert table(one) == table(other)
    assert as_page(one, "t") == as_page(other, "t")
    assert as_csv(one) == as_csv(other)
    assert as_markdown(one) == as_markdown(other)
    valid = [row for row in table(one) if not row.void]
    merits = []
    for row in valid:
        epsilon = row.metrics.get("epsilon")
        private = epsilon is not None and epsilon.n == row.seeds
        merits.append(
            (row.metrics["clean_acc"].value, row.metrics["robust_acc"].value, -epsilon.value if private else -math.inf)
        )
    assert [row.front for row in valid] == brute_force(merits)
    assert not any(row.front for row in table(one) if row.void)


# --- documents ------------------------------------------------------------------------------------------------------


def test_nothing_breaks_out_of_the_documents():
    hostile = sweep(
        job(
            "0",
            "a=1",
            attacks={NASTY: NASTY},
            threat=NASTY,
            **{"clean_acc": 0.5, "robust_acc": 0.1, f"robust_acc_{NASTY}": 0.1},
        ),
        Job(NASTY, (f"{NASTY}={NASTY}", NASTY), 1, NASTY, {}, acc(0.9, 0.5)),
        Job("2", (f"hydra.x={NASTY}", f"a={NASTY}"), 1, NASTY, {}, acc(0.8, 0.5)),
        unfinished=(Failed(NASTY, NASTY, (NASTY,)),),
        unreadable=(Failed(NASTY, NASTY),),
    )
    html = as_page(hostile, NASTY)
    page = Page(html)
    assert not {"script", "a", "iframe", "img", "link"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("href", "src")]
    assert sum("alert(1)" in words for words in page.words) > 5
    assert "{{ 7*7 }}" in html
    assert drawings(html)
    html.encode()
    markdown = as_markdown(hostile)
    assert "<script" not in markdown.replace("\\<", "")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")}) == 1
    as_csv(hostile).encode()


def test_csv_reads_back_as_it_was():
    values = ["plain", 'a "quoted", text', "-1", "+1e-3", "=1+1", "@SUM(A1)", "-1+1", "+x"]
    metrics = acc(0.1 + 0.2, 0.5, epsilon=None)
    jobs = sweep(*[Job(str(i), (f"a={v}", f"+k={i}"), 1, THREAT, {}, metrics) for i, v in enumerate(values)])
    text = as_csv(jobs)
    assert text.count("\r\n") == len(values) + 1
    read = list(csv.DictReader(io.StringIO(text, newline="")))
    safe = ["plain", 'a "quoted", text', "-1", "+1e-3", "'=1+1", "'@SUM(A1)", "'-1+1", "'+x"]
    assert sorted(line["a"] for line in read) == sorted(safe)
    assert all(float(line["clean_acc"]) == 0.1 + 0.2 for line in read)
    assert all(line["epsilon"] == "void" and line["pareto_front"] == "no" for line in read)
    assert "'+k" in read[0]


def test_the_front_is_marked_by_a_symbol_and_in_bold():
    html = as_page(sweep(job("0", "a=1", **acc(0.9, 0.5)), job("1", "a=2", **acc(0.8, 0.4))), "t")
    rows = re.findall(r"<tr.*?</tr>", html, re.S)[1:]
    assert ['class="front"' in row for row in rows] == ["★" in row for row in rows] == [True, False]
    assert ".front td { font-weight: 700; }" in html


def test_a_sweep_without_results_still_makes_documents():
    empty = sweep(unfinished=(Failed("0", "out of memory"),))
    assert "out of memory" in as_markdown(empty)
    assert "out of memory" in as_page(empty, "t")
    assert as_csv(empty).splitlines() == ["pareto_front,seeds,judged_threat,judged_attacks"]


def test_short_labels_leave_out_what_needs_not_be_said():
    assert short_label({"recipe": "trades", "objective.beta": "6"}) == "trades, beta 6"
    assert short_label({"threat.eps": "0.1", "judge.eps": "0.2"}) == "threat.eps 0.1, judge.eps 0.2"
    assert short_label({"baseline": "true"}) == "baseline true"


# --- the plot -------------------------------------------------------------------------------------------------------


def labels(svg):
    """Boxes of the labels."""
    texts = [e for e in svg.iter(f"{SVG}text") if e.get("font-size") == "11"]
    places = [(float(e.get("x")), float(e.get("y")), width_of(e.text, 11)) for e in texts]
    return [(x, y - 9, x + width, y + 2) for x, y, width in places]


def parse(text):
    return ElementTree.fromstring(text)  # noqa: S314


def numbers(svg):
    """All coordinates of a drawing."""
    names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "points")
    return [float(n) for e in svg.iter() for k in names for n in re.split("[ ,]", e.get(k) or "0")]


VALUE = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 5e-324, 1.0, 0.9, 0.9000000001]))
SPREAD = st.one_of(st.none(), st.floats(0, 1))
POINTS = st.lists(
    st.builds(Point, st.just("name"), st.just("label"), VALUE, VALUE, SPREAD, SPREAD), min_size=1, max_size=9
)


@settings(deadline=None, max_examples=60)
@given(POINTS, st.booleans())
def test_every_coordinate_is_a_number_within_the_drawing(points, percent):
    svg = parse(scatter(points, **AXES, percent=percent))
    assert all(-0.01 <= n <= 900 for n in numbers(svg))
    assert "nan" not in ElementTree.tostring(svg, encoding="unicode").lower()
    assert len(list(svg.iter(f"{SVG}circle"))) == len(points) + 2  # and those of the legend


@pytest.mark.parametrize("size", [0.0, 1e-300, 1.0, 1e99, -1e99])
def test_one_row_or_equal_rows_can_be_drawn(size):
    for count in (1, 3):
        svg = parse(scatter([Point("n", "l", size, size)] * count, **AXES, percent=False))
        assert all(0 <= n <= 900 for n in numbers(svg))


@settings(deadline=None, max_examples=30)
@given(POINTS)
def test_labels_cover_neither_one_another_nor_points(points):
    svg = parse(scatter(points, **AXES))
    boxes = labels(svg)
    dots = [(float(e.get("cx")), float(e.get("cy"))) for e in svg.iter(f"{SVG}circle")]
    for i, (a, b, c, d) in enumerate(boxes):
        assert not any(a < x < c and b < y < d for x, y in dots)
        assert not any(a < g and c > e and b < h and d > f for e, f, g, h in boxes[i + 1 :])
        assert a >= 94
        assert c <= 760


def test_where_there_is_no_room_the_tooltip_remains():
    svg = parse(scatter([Point(f"name {i}", f"label {i}", 0.5, 0.5, mark="ε = 3.0") for i in range(50)], **AXES))
    assert 0 < len(labels(svg)) < 50
    assert {f"name {i}" for i in range(50)} <= {e.text for e in svg.iter(f"{SVG}title")}


def test_points_have_their_epsilon_their_error_bars_and_a_step_line():
    jobs = sweep(
        job("0", "a=x", seed=0, **acc(0.90, 0.50)),
        job("1", "a=x", seed=1, **acc(0.92, 0.54)),
        job("2", "a=y", **acc(0.80, 0.60, epsilon=3.0)),
        job("3", "a=z", **acc(0.70, 0.40)),
        job("4", "a=v", **acc(0.95, 0.65, epsilon=None)),
    )
    (svg,) = drawings(as_page(jobs, "t"))
    assert {"y, ε = 3.0", "v, ε void"} <= {e.text for e in svg.iter(f"{SVG}text")}
    fills = [e.get("fill") for e in svg.iter(f"{SVG}circle")][2:]
    assert fills.count("#ffffff") == 2
    bars = [e for e in svg.iter(f"{SVG}line") if e.get("stroke-width") == "1.2"]
    assert len(bars) == 2
    (line,) = svg.iter(f"{SVG}polyline")
    corners = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert len(corners) == 3
    assert corners[0][0] == corners[1][0]
    assert corners[1][1] == corners[2][1]
    assert next(iter(svg.iter(f"{SVG}title"))).text == "Clean and robust accuracy"


def test_points_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="finite"):
        Point("n", "l", math.nan, 0.0)
    with pytest.raises(ValueError, match="no points"):
        scatter([], **AXES)
    with pytest.raises(ValueError, match="percent=False"):
        scatter([Point("n", "l", 2.0, 0.0)], **AXES)
    with pytest.raises(ValueError, match="NaN"):
        pareto_front([[math.nan]])


def test_neither_torch_nor_lightning_is_needed():
    heavy = "{'torch', 'pytorch_lightning', 'hydra'} & set(sys.modules)"
    code = f"import sys, robust_train.report.sweep_page; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
