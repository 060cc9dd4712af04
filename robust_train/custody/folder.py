"""Digests of the files below a folder, each a row: its relative path and its bytes."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from robust_train.custody.digest import Progress, digest, head_of_file

PIECE = 1 << 20  # bytes read at a time


def folder_digests(
    folder: str | Path, *, skip: Collection[str | Path] = (), progress: Progress | None = None
) -> tuple[list[str], list[bytes]]:
    """Names and digests of everything below a folder, sorted by name.

    Args:
        folder: where the files lie.
        skip: files that are not data, such as the manifest itself.
        progress: called with the number of files done and of all files.

    Returns:
        Paths relative to ``folder``, with ``/`` between their parts, and a digest of 32 bytes each.

    Raises:
        ValueError: there is no such folder; something in it is neither file, folder nor link; a link leads out of the
            folder; a file changed while it was read.
        OSError: something cannot be read.

    Guarantees:
        The digest of a file is ``digest((name, content))``. No link is followed: one within the folder is a row of its
        own, ``digest((name, "link", target))``. Hidden files count.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder")
    home, left_out = os.path.realpath(root), {os.path.realpath(path) for path in skip}
    names = sorted(_names_below(home, left_out))
    found = []
    for done, name in enumerate(names, start=1):
        found.append(_row(home, name))
        if progress is not None:
            progress(done, len(names))
    return names, found


def _names_below(home: str, left_out: Collection[str]) -> list[str]:
    names = []
    for at, folders, files in os.walk(home, onerror=_raise):  # which follows no links
        for name in (*files, *(name for name in folders if os.path.islink(os.path.join(at, name)))):
            path = os.path.join(at, name)
            if path not in left_out:
                names.append(Path(path).relative_to(home).as_posix())
    return names


def _raise(error: OSError) -> None:
    raise error


def _row(home: str, name: str) -> bytes:
    path = os.path.join(home, name)
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        if os.path.commonpath([home, os.path.realpath(path)]) != home:
            raise ValueError(f"{path} is a link that leads out of the folder: put the file itself there, or remove it")
        return digest((name, "link", os.readlink(path)))
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is neither a file nor a folder: remove it")
    return _file_digest(path, name)


def _file_digest(path: str, name: str) -> bytes:
    """``digest((name, content))`` without having the content in memory."""
    with open(path, "rb", buffering=0, opener=_open) as file:
        size = os.fstat(file.fileno()).st_size
        sha256, read = hashlib.sha256(head_of_file(name, size)), 0
        while piece := file.read(PIECE):
            sha256.update(piece)
            read += len(piece)
    if read != size:
        raise ValueError(f"{path} changed while it was read ({size} bytes announced, {read} read)")
    return sha256.digest()


def _open(path: Any, flags: int) -> int:
    """Neither through a link nor waiting for a pipe, should the file have been replaced by one."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
