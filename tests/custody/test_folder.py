"""Digests of a folder's files: what is a row, and what is refused."""

from __future__ import annotations

import os

import pytest

from robust_train.custody import folder as module
from robust_train.custody.digest import digest
from robust_train.custody.folder import folder_digests


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for name, content in {
        "b/2.txt": b"two",
        "b/1.txt": b"",
        "a.bin": bytes(5000),
        ".hidden": b"h",
        "b.x": b"x",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "empty").mkdir()
    return root


def test_each_file_is_a_row_sorted_by_name(folder, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 7)
    names, rows = folder_digests(folder)
    assert names == [".hidden", "a.bin", "b.x", "b/1.txt", "b/2.txt"]
    assert rows == [digest((name, (folder / name).read_bytes())) for name in names]


def test_what_is_left_out(folder):
    names, _ = folder_digests(folder, skip=[folder / "b" / ".." / "a.bin", "none.json"])
    assert "a.bin" not in names
    assert len(names) == 4


def test_progress(folder):
    seen = []
    folder_digests(folder, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_links_within_are_rows_and_not_followed(folder):
    (folder / "z").symlink_to("a.bin")
    (folder / "loop").symlink_to(".")
    (folder / "b" / "up").symlink_to("../b")
    names, rows = folder_digests(folder)
    assert names == [".hidden", "a.bin", "b.x", "b/1.txt", "b/2.txt", "b/up", "loop", "z"]
    assert rows[-1] == digest(("z", "link", "a.bin"))


@pytest.mark.parametrize("target", ["/etc/passwd", "../beside", "../data_too", ".."])
def test_a_link_out_of_the_folder_is_refused(folder, target):
    (folder.parent / "data_too").mkdir()
    (folder / "z").symlink_to(target)
    with pytest.raises(ValueError, match="z is a link that leads out of the folder"):
        folder_digests(folder)


def test_a_pipe_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
        folder_digests(folder)


def test_a_file_that_changes_while_it_is_read_is_refused(folder, monkeypatch):
    monkeypatch.setattr(module, "head_of_file", lambda name, size: (folder / name).write_bytes(bytes(size + 1)) * b"")
    with pytest.raises(ValueError, match="changed while it was read"):
        folder_digests(folder)


def test_a_folder_that_cannot_be_read_is_an_error_not_a_hole(folder, monkeypatch):
    scandir = os.scandir

    def scan(at):
        if os.fspath(at).endswith("/b"):
            raise PermissionError(13, "Permission denied", at)
        return scandir(at)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(PermissionError):
        folder_digests(folder)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="nothing is no folder"):
        folder_digests(tmp_path / "nothing")
