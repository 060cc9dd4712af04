"""The table of decisions and the report: what is written is what is read, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robust_train.poisoning.records import (
    DECISIONS,
    DOWNWEIGHT,
    DROP,
    KEEP,
    QUARANTINE,
    Column,
    Decisions,
    most_suspicious,
    read_decisions,
    read_report,
    summary,
    write_decisions,
    write_report,
)

HEX = "0123456789abcdef" * 4


def column(name="spectral", scores=(0.5, 2.0, -1.0, 3.0), threshold=1.0, flagged=None, **calibration):
    scores = np.array(scores)
    return Column(name, scores, threshold, scores > 1 if flagged is None else np.array(flagged), calibration)


def decided(*columns, **changes):
    rows = {
        "labels": np.array([0, 1, 1, 2]),
        "digests": [f"{i}{HEX[1:]}" for i in range(4)],
        "columns": columns or (column(),),
        "decision": np.array([KEEP, DROP, DOWNWEIGHT, QUARANTINE]),
        "weights": np.array([1.0, 0.0, 0.25, 0.0]),
    }
    return Decisions(**{**rows, **changes})


def same(one, other):
    assert (one.labels == other.labels).all()
    assert one.digests == other.digests
    assert (one.decision == other.decision).all()
    assert (one.weights == other.weights).all()
    for mine, its in zip(one.columns, other.columns, strict=True):
        assert (mine.name, mine.threshold) == (its.name, its.threshold)
        assert (mine.scores == its.scores).all()
        assert (mine.flagged == its.flagged).all()


@st.composite
def any_decisions(draw):
    n = draw(st.integers(1, 8))
    number = st.floats(allow_nan=False, allow_infinity=False)
    names = draw(st.lists(st.from_regex(r"[a-z][a-z_. -]{0,6}", fullmatch=True), unique=True, max_size=3))
    columns = tuple(
        Column(
            name,
            np.array(draw(st.lists(number, min_size=n, max_size=n))),
            draw(st.none() | number),
            np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))),
        )
        for name in names
    )
    decision = np.array(draw(st.lists(st.sampled_from(DECISIONS), min_size=n, max_size=n)))
    weight = draw(st.floats(1e-300, 1e300))
    return Decisions(
        np.array(draw(st.lists(st.integers(0, 999), min_size=n, max_size=n))),
        draw(st.none() | st.lists(st.from_regex("[0-9a-f]{64}", fullmatch=True), min_size=n, max_size=n)),
        columns,
        decision,
        np.where(np.isin(decision, (KEEP, DOWNWEIGHT)), weight, 0.0),
    )


@given(any_decisions())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_number_comes_back(tmp_path, decisions):
    write_decisions(tmp_path / "d.csv", decisions)
    same(read_decisions(tmp_path / "d.csv"), decisions)


def test_the_table_has_a_line_for_every_row(tmp_path):
    write_decisions(tmp_path / "d.csv", decided(column(), column("aum", threshold=None)))
    lines = (tmp_path / "d.csv").read_text().splitlines()
    assert lines[0] == (
        "index,sha256,label,spectral.score,spectral.threshold,spectral.flagged,aum.score,aum.threshold,aum.flagged,"
        "decision,weight"
    )
    assert lines[4] == f"3,3{HEX[1:]},2,3.0,1.0,1,3.0,,1,quarantine,0.0"
    assert len(lines) == 5
    assert os.listdir(tmp_path) == ["d.csv"]


def test_sixty_thousand_rows_are_written_in_two_seconds(tmp_path):
    n, rng = 60_000, np.random.default_rng(0)
    columns = [Column(f"filter_{i}", rng.normal(size=n), 2.0, rng.random(n) < 0.01) for i in range(4)]
    large = Decisions(rng.integers(0, 10, n), [HEX] * n, tuple(columns), np.full(n, KEEP), np.ones(n))
    start = time.process_time()
    write_decisions(tmp_path / "d.csv", large)
    assert time.process_time() - start < 2
    same(read_decisions(tmp_path / "d.csv"), large)


def test_more_rows_than_are_parsed_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("robust_train.poisoning.records.CHUNK", 3)
    write_decisions(tmp_path / "d.csv", decided())
    same(read_decisions(tmp_path / "d.csv"), decided())


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    write_decisions(tmp_path / "d.csv", decided())
    before = (tmp_path / "d.csv").read_bytes()
    broken = decided()
    broken.labels.resize(3, refcheck=False)
    with pytest.raises(ValueError, match="zip"):
        write_decisions(tmp_path / "d.csv", broken)
    assert (tmp_path / "d.csv").read_bytes() == before
    assert os.listdir(tmp_path) == ["d.csv"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.replace("index", "row", 1), "its first line names other columns"),
        (lambda t: "", "its first line names other columns"),
        (lambda t: t.splitlines()[0] + "\n", "the table has no rows"),
        (lambda t: t.replace("\n3,", "\n4,"), "column index must count the rows"),
        (lambda t: t.replace(",quarantine,0.0", ",quarantine"), "line 5 has 7 cells, not 8"),
        (lambda t: t.replace("2.0", "nan"), "column.scores of spectral must be one finite number"),
        (lambda t: t.replace("2.0", "1e999"), "column.scores of spectral must be one finite number"),
        (lambda t: t.replace("2.0", "=1+1"), "column spectral.score must hold numbers only"),
        (lambda t: t.replace("\n1,", f"\n{10**30},"), "column index must hold numbers only"),
        (lambda t: t.replace("2.0,1.0,1", "2.0,1.5,1"), "column spectral.threshold must hold one and the same"),
        (lambda t: t.replace("2.0,1.0,1", "2.0,1.0,yes"), "column spectral.flagged must hold 0 and 1 only"),
        (lambda t: t.replace("drop", "destroy"), "decisions.decision must be one of keep, drop"),
        (lambda t: t.replace("drop,0.0", "drop,1.0"), "decisions.weights must be 0 where a row is dropped"),
        (lambda t: t.replace(f"1{HEX[1:]}", "f00"), r"decisions.digests\[1\] must be 64 lower-case hex digits"),
        (lambda t: t.replace(f"1{HEX[1:]},1,", f"1{HEX[1:]},999999999999,"), "decisions.labels must be class indices"),
        (lambda t: t.replace("spectral", "<b>"), "column.name must be letters"),
        (lambda t: t.replace("drop", '"drop'), "unexpected end of data"),
        (lambda t: t.replace("drop", "\udcff"), "utf-8"),
    ],
)
def test_a_table_that_is_wrong_is_refused_in_one_line(tmp_path, change, says):
    path = tmp_path / "d.csv"
    write_decisions(path, decided())
    path.write_text(change(path.read_text()), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=says) as caught:
        read_decisions(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path, monkeypatch):
    for read in (read_decisions, read_report):
        with pytest.raises(ValueError, match="there is no such file"):
            read(tmp_path / "none")
        with pytest.raises(ValueError, match="there is no such file"):
            read(tmp_path)
    monkeypatch.setattr("robust_train.poisoning.records.LARGEST_TABLE", 10)
    write_decisions(tmp_path / "d.csv", decided())
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_decisions(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: column(name="a,b"), "column.name must be letters"),
        (lambda: column(scores=[0.0, np.nan, 1.0, 2.0]), "column.scores of spectral must be one finite number a row"),
        (lambda: column(threshold=np.inf), "column.threshold of spectral must be finite or None"),
        (lambda: column(flagged=[True]), "column.flagged of spectral must be true or false for each of 4 rows"),
        (lambda: column(flagged=[0, 1, 0, 1]), "column.flagged of spectral"),
        (lambda: replace(column(), calibration=[1]), "column.calibration of spectral must be a dict"),
        (lambda: decided(labels=np.array([0.0, 1, 1, 2])), "decisions.labels must be one class index a row"),
        (lambda: decided(labels=np.array([-1, 1, 1, 2])), "decisions.labels must be class indices from 0"),
        (lambda: decided(digests=[HEX]), "decisions.digests has 1 digests for 4 rows"),
        (lambda: decided(column(), column()), "decisions.columns must have different names"),
        (lambda: decided(column(scores=[1.0])), "decisions.columns: spectral has 1 scores for 4 rows"),
        (lambda: decided(weights=np.ones(4)), "for row 1: drop"),
        (lambda: decided(weights=np.array([1, 0, np.nan, 0])), "decisions.weights must be one finite number >= 0"),
        (lambda: decided(decision=np.array([KEEP])), "decisions.decision must be one of"),
    ],
)
def test_contradictions_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_the_summary_counts():
    made = summary(decided(column(method="canaries")), classes=4)
    assert made["rows"] == 4
    assert made["kept"] == 2
    assert made["expected_fpr"] is None
    assert made["decisions"] == {"keep": 1, "drop": 1, "downweight": 1, "quarantine": 1}
    assert made["classes"][1] == {"label": 1, "rows": 2, "keep": 0, "drop": 1, "downweight": 1, "quarantine": 0}
    assert [c["rows"] for c in made["classes"]] == [1, 2, 1, 0]
    spectral = made["filters"]["spectral"]
    assert (spectral["flagged"], spectral["flagged_per_class"]) == (2, [0, 1, 1, 0])
    assert (spectral["threshold"], spectral["calibration"]) == (1.0, {"method": "canaries"})
    first = {"index": 3, "label": 2, "sha256": f"3{HEX[1:]}", "score": 3.0, "decision": "quarantine"}
    assert spectral["suspicious"][0] == first
    with pytest.raises(ValueError, match="classes must be more than the largest label, got 2 and 2"):
        summary(decided(), classes=2)


@pytest.mark.parametrize(
    ("rates", "together"),
    [((0.01, 0.02), 0.03), ((0.01, None), 0.01), ((0.0,), 0.0), ((0.9, 0.9), 1.0), (("0.1", float("nan")), None)],
)
def test_expected_false_alarms_of_thresholds_add_up(rates, together):
    columns = [column(f"filter {i}", expected_fpr=rate) for i, rate in enumerate(rates)]
    assert summary(decided(*columns), 3)["expected_fpr"] == pytest.approx(together)


def test_of_equal_scores_the_first_rows_are_the_most_suspicious():
    assert most_suspicious(column(scores=[1.0, 5.0, 5.0, 0.0], flagged=[False] * 4), 3) == [1, 2, 0]


def test_a_report_keeps_its_order_and_is_plain_json(tmp_path):
    report = {"z": 1, "a": {"ünï": [1.5, None, True]}, **summary(decided(), 3)}
    write_report(tmp_path / "r.json", report)
    assert list(read_report(tmp_path / "r.json")) == list(report)
    assert read_report(tmp_path / "r.json") == report
    for bad in ({"a": float("nan")}, {"a": np.ones(2)}, {"a": {1, 2}}):
        with pytest.raises(ValueError, match="the report cannot be written as JSON"):
            write_report(tmp_path / "r.json", bad)
    assert read_report(tmp_path / "r.json") == report
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "no report of a filter"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1, "a": 2}', "stands there twice"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting property name"),
    ],
)
def test_a_report_that_is_wrong_is_refused_in_one_line(tmp_path, text, says):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        read_report(tmp_path / "r.json")
    assert "\n" not in str(caught.value)


def test_the_summary_can_be_written_as_json():
    assert json.loads(json.dumps(summary(decided(), 3), allow_nan=False)) == summary(decided(), 3)


def test_records_and_the_command_need_no_torch():
    code = "import sys, robust_train.poisoning.command; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
