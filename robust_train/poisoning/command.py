"""``robust-train quarantine``: look at the rows that filters left out, and put some back. Needs no torch."""

from __future__ import annotations

import argparse
import csv
import getpass
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from robust_train.poisoning._files import written_whole
from robust_train.poisoning.quarantine import QUARANTINED, RESTORED, Entry, Quarantine, file_of

Load = Callable[[list[str]], Any]
Digest = Callable[[Any], bytes]
Draw = Callable[[np.ndarray], bytes]

COMMANDS = """\
list     which rows were left out of training, and why
restore  put rows back: the next run uses them whatever its filters say
export   a table of the rows, and their pictures

FILE is a quarantine.json, or the folder of the run that wrote it.
examples: robust-train quarantine list runs/last --filter spectral
          robust-train quarantine restore runs/last 17 23 --reason "looked at them: sevens with a bar"
          robust-train quarantine export runs/last --out look data=fashion_mnist
"""
SHOWN = 20  # rows of a table, unless told otherwise
SMALLEST, LARGEST = 4, 4096  # pixels on a side of what counts as a picture
SCORES = 4  # filters whose scores fit into a line


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is in ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str], load: Load | None = None, digest: Digest | None = None, draw: Draw | None = None) -> None:
    """Run the command.

    Args:
        argv: what stands after ``robust-train quarantine``.
        load: from overrides, such as ``["data=fashion_mnist"]``, to an object with a ``dataset``.
        digest: SHA-256 of an example of the dataset, as the quarantine has it.
        draw: from uint8 pixels, ``(H, W)`` or ``(H, W, 3)``, to a PNG file. Pictures are exported where all three are
            given.

    Raises:
        SystemExit: with code 2 and one line where the arguments cannot be used, or a file or the data cannot be read.
    """
    parser = _Parser(
        "robust-train quarantine",
        description="The rows that filters left out of training.",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("list", "restore", "export"), metavar="list | restore | export")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="FILE …", help="see list --help, restore --help, …")
    chosen = parser.parse_args(argv)
    command, rest = chosen.command, chosen.rest
    parser = _Parser(f"robust-train quarantine {command}")
    parser.add_argument("file", type=Path, metavar="FILE", help="quarantine.json, or the folder that it lies in")
    try:
        if command == "list":
            _list(_list_settings(parser, rest))
        elif command == "restore":
            _restore(_restore_settings(parser, rest))
        else:
            _export(_export_settings(parser, rest), load, digest, draw)
    except (ValueError, TypeError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {_one_line(error)}\n")


# --- list -----------------------------------------------------------------------------------------------------------


def _list_settings(parser: _Parser, rest: list[str]) -> argparse.Namespace:
    _add_selection(parser)
    parser.add_argument("--limit", type=int, metavar="N", help=f"rows to show (default: {SHOWN}; with --json all)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    return parser.parse_intermixed_args(rest)


def _list(settings: argparse.Namespace) -> None:
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"--limit must be >= 1, got {settings.limit}")
    quarantine = Quarantine.read(settings.file)
    found = quarantine.selected(by=settings.filter, label=settings.label)
    if settings.json:
        head = {"root": quarantine.root, "rows": quarantine.rows, "classes": quarantine.classes, "found": len(found)}
        entries = [asdict(entry) for entry in found[: settings.limit]]
        _say(json.dumps({**head, "entries": entries}, indent=1) + "\n")
        return
    counts = quarantine.counts()
    _say(
        f"{counts[QUARANTINED]} of {quarantine.rows} rows are left out of training, {counts[RESTORED]} restored.\n"
        + _table(found[: settings.limit or SHOWN], quarantine.filters, settings.filter)
        + f"{min(len(found), settings.limit or SHOWN)} of {len(found)} shown.\n"
    )


def _table(entries: list[Entry], filters: list[str], first: str | None) -> str:
    """A line for each entry, with the scores of a few filters, beginning with ``first``."""
    names = sorted(filters, key=lambda name: name != first)[:SCORES]
    head = ["index", "label", "decision", "status", *names, "flagged by"]
    lines = [head]
    for entry in entries:
        scores = [f"{entry.scores[name]:.4g}" if name in entry.scores else "" for name in names]
        lines.append(
            [str(entry.index), str(entry.label), entry.decision, entry.status, *scores, ", ".join(entry.filters)]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    words = {2, 3, len(head) - 1}  # the other columns hold numbers
    return "".join(
        "  ".join(f"{cell:{'<' if i in words else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip() + "\n"
        for line in lines
    )


# --- restore --------------------------------------------------------------------------------------------------------


def _restore_settings(parser: _Parser, rest: list[str]) -> argparse.Namespace:
    parser.add_argument("indices", nargs="*", type=int, metavar="INDEX", help="numbers of rows in the dataset")
    _add_selection(parser)
    parser.add_argument("--all", action="store_true", help="every row")
    parser.add_argument("--reason", default="", metavar="TEXT", help="kept in the file, for whoever asks later")
    return parser.parse_intermixed_args(rest)


def _restore(settings: argparse.Namespace) -> None:
    by_rule = settings.filter is not None or settings.label is not None
    if [bool(settings.indices), by_rule, settings.all].count(True) != 1:
        raise ValueError("say which rows: either by INDEX, or by --filter NAME and --class N, or --all")
    path = file_of(settings.file)
    quarantine = Quarantine.read(path)
    wanted = settings.indices or [e.index for e in quarantine.selected(by=settings.filter, label=settings.label)]
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    made = quarantine.restore(wanted, reason=settings.reason, who=_user(), when=when)
    count = made.counts()[RESTORED] - quarantine.counts()[RESTORED]
    if count == 0:
        raise ValueError(f"{path}: none of these rows is quarantined, nothing was restored")
    made.write(path)
    _say(
        f"{_rows(count)} restored, {made.counts()[QUARANTINED]} left out still.\nwritten  {path}\n"
        f"next     train again with quarantine={path} in DataFilter: it uses the restored rows whatever filters say\n"
    )


# --- export ---------------------------------------------------------------------------------------------------------


def _export_settings(parser: _Parser, rest: list[str]) -> argparse.Namespace:
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="name the data, such as data=fashion_mnist")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    return parser.parse_intermixed_args(rest)


def _export(settings: argparse.Namespace, load: Load | None, digest: Digest | None, draw: Draw | None) -> None:
    quarantine = Quarantine.read(settings.file)
    folder: Path = settings.out
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: name a new folder with --out")
    if not settings.overrides:
        folder.mkdir(parents=True, exist_ok=True)
        _write_table(folder / "quarantine.csv", quarantine)
        _say(f"{_rows(len(quarantine.entries))} in {folder}/quarantine.csv; for pictures name the data by overrides\n")
        return
    if load is None or digest is None or draw is None:
        raise ValueError("data cannot be loaded here: leave the overrides out, and only the table is written")
    dataset = load(list(settings.overrides)).dataset
    checked = _check(quarantine, dataset, digest)
    folder.mkdir(parents=True, exist_ok=True)
    _write_table(folder / "quarantine.csv", quarantine)
    drawn = 0
    for entry in quarantine.entries:
        image = pixels(dataset[entry.index])
        if image is not None:
            (folder / f"row_{entry.index:06d}_class_{entry.label}.png").write_bytes(draw(image))
            drawn += 1
    without = len(quarantine.entries) - drawn
    _say(
        f"{_rows(len(quarantine.entries))} in {folder}/quarantine.csv, {drawn} of them as pictures"
        + (f" ({without} do not look like pictures)" if without else "")
        + f"\n{checked}\n"
    )


def _check(quarantine: Quarantine, dataset: Any, digest: Digest) -> str:
    """Compare the data with the quarantine, and say what was found; refuse other data."""
    if len(dataset) != quarantine.rows:
        raise ValueError(f"these are other data: they have {len(dataset)} rows, the quarantine is of {quarantine.rows}")
    entries = [entry for entry in quarantine.entries if entry.sha256 is not None]
    for entry in entries:
        if digest(dataset[entry.index]).hex() != entry.sha256:
            raise ValueError(f"these are other data: row {entry.index} has not the sha256 that the quarantine has")
    if len(entries) < len(quarantine.entries):
        return "NOT checked: the quarantine has no digests, so these may be other data"
    return "checked: every row is the one that was quarantined"


def _write_table(path: Path, quarantine: Quarantine) -> None:
    names = quarantine.filters
    with written_whole(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        scores = [f"{name}.score" for name in names]
        writer.writerow(["index", "sha256", "label", "decision", "status", "filters", *scores])
        for e in quarantine.entries:
            own = [e.scores.get(name, "") for name in names]
            writer.writerow([e.index, e.sha256 or "", e.label, e.decision, e.status, "; ".join(e.filters), *own])


def pixels(example: Any) -> np.ndarray | None:
    """The picture in an example, as uint8 ``(H, W)`` or ``(H, W, 3)``; None where there is none.

    Args:
        example: an array, tensor or image, or a tuple, list or dict whose first item is one. Floats in [0, 1] and whole
            numbers in [0, 255] are shown as they are; others, such as normalised ones, from their lowest to their
            highest value.
    """
    while isinstance(example, (tuple, list, Mapping)) and len(example):
        example = next(iter(example.values() if isinstance(example, Mapping) else example))
    try:
        image = np.asarray(example)
    except (TypeError, ValueError, RuntimeError):  # torch refuses tensors on a GPU, or that require gradients
        return None
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = np.moveaxis(image, 0, -1)
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] != 3) or image.dtype.kind not in "buif":
        return None
    if not all(SMALLEST <= side <= LARGEST for side in image.shape[:2]) or not np.isfinite(image).all():
        return None
    values = image.astype(np.float64)
    low, high = (0, 1) if image.dtype.kind in "bf" else (0, 255)
    if values.min() < low or values.max() > high:
        low, high = values.min(), values.max()
    return np.rint((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8)


# --- all ------------------------------------------------------------------------------------------------------------


def _add_selection(parser: _Parser) -> None:
    parser.add_argument("--filter", metavar="NAME", help="rows that this filter flagged")
    parser.add_argument("--class", type=int, dest="label", metavar="N", help="rows of this class")


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container may run under a number that has no name
        return "unknown"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return " ".join(line if line.isprintable() else ascii(line) for line in str(error).splitlines())


def _say(text: str) -> None:
    """Print; whoever reads may stop reading at any time."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
