"""``robust-train quarantine``: what it prints and writes, its exit status, and errors of one line."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from robust_train.poisoning.command import main, pixels
from robust_train.poisoning.quarantine import Quarantine
from robust_train.poisoning.records import KEEP, QUARANTINE, Column, Decisions

N = 60


def digest(example) -> bytes:
    x, label = example
    return hashlib.sha256(np.asarray(x).tobytes() + bytes([label])).digest()


def dataset(seed=0):
    images = np.random.default_rng(seed).random((N, 1, 8, 8)).astype(np.float32)
    return [(image, i % 3) for i, image in enumerate(images)]


def load(overrides):
    if overrides == ["data=bad"]:
        raise ValueError("data=bad: there is\nno such data set")
    data = {"data=toy": dataset(), "data=other": dataset(1), "data=short": dataset()[:9]}[overrides[0]]
    return SimpleNamespace(dataset=data)


def draw(image) -> bytes:
    assert image.dtype == np.uint8
    return b"PNG" + image.tobytes()


@pytest.fixture
def run(tmp_path):
    """A run's folder in which every second row is quarantined."""
    scores = np.arange(float(N))
    decision = np.where(np.arange(N) % 2 == 0, QUARANTINE, KEEP)
    columns = (Column("spectral", scores, 39.5, scores > 39.5), Column("aum", -scores, None, scores < 40))
    data = dataset()
    made = Decisions(
        np.arange(N) % 3, [digest(row).hex() for row in data], columns, decision, (decision == KEEP).astype(float)
    )
    (tmp_path / "run").mkdir()
    Quarantine.of(made, classes=3).write(tmp_path / "run" / "quarantine.json")
    return tmp_path / "run"


def status(*arguments, load=load) -> object:
    try:
        main([str(a) for a in arguments], load, digest, draw)
    except SystemExit as stopped:
        return stopped.code
    return 0


def refused(capsys, *arguments, **settings) -> str:
    """The one line that it says."""
    assert status(*arguments, **settings) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1
    return said.err


def test_the_rows_are_listed(capsys, run):
    assert status("list", run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "30 of 60 rows are left out of training, 0 restored."
    assert lines[1].split() == ["index", "label", "decision", "status", "spectral", "aum", "flagged", "by"]
    assert lines[2].split() == ["0", "0", "quarantine", "quarantined", "0", "-0", "aum"]
    assert len(lines) == 23
    assert lines[-1] == "20 of 30 shown."


def test_the_rows_of_a_filter_are_listed_by_its_scores(capsys, run):
    status("list", run / "quarantine.json", "--filter", "spectral", "--class", "1", "--limit", "2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["58", "52"]
    assert lines[-1] == "2 of 4 shown."
    status("list", run, "--filter", "aum")
    assert capsys.readouterr().out.splitlines()[1].split()[4:6] == ["aum", "spectral"]


def test_the_list_as_json_holds_all_rows(capsys, run):
    status("list", run, "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["classes"], found["found"], len(found["entries"])) == (60, 3, 30, 30)
    assert found["entries"][0]["scores"] == {"spectral": 0.0, "aum": 0.0}
    status("list", run, "--json", "--limit", "2")
    assert len(json.loads(capsys.readouterr().out)["entries"]) == 2


def test_rows_are_restored_by_number(capsys, run):
    assert status("restore", run, "--reason", "looked at them", 4, 2) == 0
    out = capsys.readouterr().out
    assert "2 rows restored, 28 left out still." in out
    assert f"train again with quarantine={run}/quarantine.json in DataFilter" in out
    entries = {entry.index: entry for entry in Quarantine.read(run).entries}
    assert [i for i, entry in entries.items() if entry.status == "restored"] == [2, 4]
    assert entries[2].history[0].reason == "looked at them"
    assert entries[2].history[0].who
    assert entries[2].history[0].when.endswith("+00:00")
    assert not entries[6].history


@pytest.mark.parametrize(
    ("selection", "rows"),
    [
        (["--filter", "spectral"], {40, 42, 44, 46, 48, 50, 52, 54, 56, 58}),
        (["--class", "2"], set(range(2, N, 6))),
        (["--class", "2", "--filter", "spectral"], {44, 50, 56}),
        (["--all"], set(range(0, N, 2))),
    ],
)
def test_rows_are_restored_by_rule(run, selection, rows):
    assert status("restore", run, *selection) == 0
    assert {e.index for e in Quarantine.read(run).entries if e.status == "restored"} == rows


def test_a_refused_restore_changes_nothing(capsys, run):
    before = (run / "quarantine.json").read_bytes()
    for arguments, says in (
        ([], "say which rows"),
        (["2", "--all"], "say which rows"),
        (["--all", "--class", "1"], "say which rows"),
        (["2", "3"], "no entry has the index 3"),
        (["two"], "invalid int value"),
        (["--filter", "knn"], "no filter is called 'knn'; there are: spectral, aum"),
        (["2", "--reason", "x" * 2001], "event.reason must be a text of at most 2000"),
    ):
        assert says in refused(capsys, "restore", run, *arguments)
    assert (run / "quarantine.json").read_bytes() == before
    status("restore", run, 2)
    capsys.readouterr()
    assert "nothing was restored" in refused(capsys, "restore", run, 2)


def test_the_table_is_exported_without_data(capsys, run, tmp_path):
    assert status("export", run, "--out", tmp_path / "a" / "look", load=None) == 0
    with (tmp_path / "a" / "look" / "quarantine.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert rows[29]["index"] == "58"
    assert rows[29]["filters"] == "spectral"
    assert float(rows[29]["spectral.score"]) == 58
    assert rows[29]["sha256"] == digest(dataset()[58]).hex()
    assert "for pictures name the data" in capsys.readouterr().out


def test_pictures_are_exported_once_the_data_are_known_to_be_the_same(capsys, run, tmp_path):
    assert status("export", run, "data=toy", "--out", tmp_path / "look") == 0
    out = capsys.readouterr().out
    assert "30 of them as pictures\n" in out
    assert "checked: every row is the one that was quarantined" in out
    image = (tmp_path / "look" / "row_000058_class_1.png").read_bytes()
    assert image == draw(np.rint(dataset()[58][0][0] * 255).astype(np.uint8))
    assert len(list((tmp_path / "look").iterdir())) == 31


def test_other_data_are_refused_before_anything_is_written(capsys, run, tmp_path):
    out = tmp_path / "look"
    for data, says in (
        ("data=other", "row 0 has not the sha256"),
        ("data=short", "they have 9 rows, the quarantine is of 60"),
        ("data=bad", "data=bad: there is no such data set"),
    ):
        assert says in refused(capsys, "export", run, data, "--out", out)
        assert not out.exists()
    assert "data cannot be loaded here" in refused(capsys, "export", run, "data=toy", "--out", out, load=None)


def test_without_digests_the_export_says_that_nothing_was_checked(capsys, run, tmp_path):
    path = run / "quarantine.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "entries": [{**entry, "sha256": None} for entry in state["entries"]]}))
    assert status("export", run, "data=other", "--out", tmp_path / "look") == 0
    assert "NOT checked" in capsys.readouterr().out


def test_a_folder_with_files_is_not_exported_into(capsys, run, tmp_path):
    assert "is not empty" in refused(capsys, "export", run, "--out", run)
    (tmp_path / "file").touch()
    assert "is not empty" in refused(capsys, "export", run, "--out", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert status("export", run, "--out", tmp_path / "empty") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required"),
        (["destroy", "x"], "invalid choice: 'destroy'"),
        (["list"], "the following arguments are required: FILE"),
        (["list", "none"], "none: there is no such file"),
        (["list", "none", "--limit", "0"], "--limit must be >= 1"),
        (["export", "none"], "the following arguments are required: --out"),
    ],
)
def test_errors_are_one_line(capsys, arguments, says):
    assert says in refused(capsys, *arguments)


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"], ["restore", "--help"], ["export", "-h"]])
def test_help_is_there(capsys, arguments):
    assert status(*arguments) == 0
    assert "usage: robust-train quarantine" in capsys.readouterr().out


def test_whoever_reads_may_stop_reading(run):
    code = "import sys; from robust_train.poisoning.command import main; main(sys.argv[1:])"
    many = [sys.executable, "-c", code, "list", str(run), "--json"]
    writer = subprocess.Popen(many, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.close()
    _, err = writer.communicate(timeout=60)
    assert writer.returncode == 0
    assert err == b""


def test_what_looks_like_a_picture_becomes_pixels():
    torch = pytest.importorskip("torch")
    grey = np.linspace(0, 1, 64).reshape(8, 8)
    expected = np.rint(grey * 255).astype(np.uint8)
    for example in (
        grey,
        (grey, 3),
        [{"image": grey, "label": 3}],
        grey[None],
        grey[..., None],
        torch.tensor(grey)[None],
        expected,
        expected.astype(int),
        (grey - 0.3) * 7,  # normalised
    ):
        np.testing.assert_array_equal(pixels(example), expected)
    colour = np.random.default_rng(0).integers(0, 256, (3, 6, 5), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(torch.tensor(colour)), np.moveaxis(colour, 0, -1))
    np.testing.assert_array_equal(pixels(np.moveaxis(colour, 0, -1)), np.moveaxis(colour, 0, -1))
    np.testing.assert_array_equal(pixels((np.full((4, 4), 9.0), 0)), np.zeros((4, 4)))


@pytest.mark.parametrize(
    "example",
    [
        (1, 2),
        (),
        "text",
        None,
        np.zeros(9),
        np.zeros((2, 8, 8)),
        np.zeros((3, 3)),
        np.zeros((1, 4, 5000)),
        np.full((8, 8), np.nan),
        np.array([["a"] * 8] * 8),
        [[1, 2], [3]],
    ],
)
def test_what_does_not_is_left_out(example):
    assert pixels(example) is None
