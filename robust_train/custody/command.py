"""``robust-train manifest`` and ``robust-train verify``: record what the data are, and tell whether they still are."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

from robust_train.custody.difference import printable
from robust_train.custody.digest import Progress
from robust_train.custody.manifest import Manifest, Part, compare

Load = Callable[[list[str]], Any]

MANIFEST = """\
Each row is one training example, or one file of --folder. Give the dataset without random transforms: what is recorded
are the data as they are stored. With --append only the rows that are added are read.

examples: robust-train manifest data=fashion_mnist --licence MIT
          robust-train manifest --folder images --out images.json
          robust-train manifest --folder images_of_may --append images.json
"""
VERIFY = """\
Without overrides or --folder, the data are read from where the manifest says.
Exit status: 0 the data are as recorded, 1 they are not, 2 that cannot be told.

examples: robust-train verify manifest.json
          robust-train verify images.json --folder a_copy_of_images --json
"""

# What a manifest, which may come from a stranger, may set by itself: which data set, and its plain settings.
HARMLESS = re.compile(r"\+?data=[\w/-]+|\+?data(\.[A-Za-z]\w*)+=[\w./:+ -]*")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is in ``--help``."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def manifest_main(argv: list[str], load: Load) -> None:
    """Write the manifest of a dataset or a folder.

    Args:
        argv: what stands after ``robust-train manifest``.
        load: from overrides, such as ``["data=fashion_mnist"]``, to an object with a ``dataset``, a ``label_of``
            (of an example; or None) and a ``schema`` (plain builtins, or None).

    Raises:
        SystemExit: with code 2 and one line where the arguments cannot be used or the data cannot be read.
    """
    parser = _Parser("robust-train manifest", description="Record a dataset, row by row.", epilog=MANIFEST)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="name the data, such as data=fashion_mnist")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="record the files below a folder instead")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: manifest.json, or what --append names")
    parser.add_argument("--append", type=Path, metavar="MANIFEST", help="add the rows to those of a manifest")
    parser.add_argument("--source", default="", metavar="TEXT", help="where the data came from")
    parser.add_argument("--licence", default="", metavar="TEXT", help="under which they may be used")
    parser.add_argument("--acquired", default="", metavar="YYYY-MM-DD", help="on which day they were acquired")
    settings = parser.parse_intermixed_args(argv)
    try:
        path = settings.out or settings.append or Path("manifest.json")
        made = _record(settings, path, load)
        made.write(path)
    except (ValueError, TypeError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {_one_line(error)}\n")
    classes = ", ".join(f"{printable(label)}: {n}" for label, n in list(made.classes.items())[:20])
    more = ", …" if len(made.classes) > 20 else ""
    _say(f"root     {made.root}\nrows     {made.count}\n" + (f"classes  {classes}{more}\n" if classes else ""))
    _say(f"written  {path}\n")


def verify_main(argv: list[str], load: Load) -> None:
    """Compare data with their manifest.

    Args:
        argv: what stands after ``robust-train verify``.
        load: as in ``manifest_main``.

    Raises:
        SystemExit: with code 1 where the data are not as recorded; with 2 and one line where the arguments cannot be
            used, or the manifest or the data cannot be read.
    """
    parser = _Parser("robust-train verify", description="Compare data with their manifest.", epilog=VERIFY)
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="name the data; default: as recorded")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="the data are the files below this folder")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="rows that a line names at most")
    parser.add_argument("--json", action="store_true", help="print the difference as JSON")
    settings = parser.parse_intermixed_args(argv)
    try:
        if settings.limit < 1:
            raise ValueError(f"--limit must be >= 1, got {settings.limit}")
        recorded = Manifest.read(settings.manifest)
        found = _found(settings, recorded, load)
    except (ValueError, TypeError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {_one_line(error)}\n")
    difference = compare(recorded, found)
    if settings.json:
        sides = {"recorded": recorded, "found": found}
        head = {name: {"root": side.root, "count": side.count} for name, side in sides.items()}
        _say(json.dumps({**difference.to_dict(), **head}, indent=2) + "\n")
    elif difference.equal:
        _say(f"root  {recorded.root}\nrows  {recorded.count}\nEqual: every row is as recorded.\n")
    else:
        _say(
            f"root  {recorded.root} recorded\n      {found.root} found\nrows  {recorded.count} recorded, "
            f"{found.count} found\nDIFFERENT:\n{difference.text(settings.limit)}\n"
        )
    if not difference.equal:
        raise SystemExit(1)


def _record(settings: argparse.Namespace, path: Path, load: Load) -> Manifest:
    if bool(settings.overrides) == (settings.folder is not None):
        raise ValueError("name the data: either by overrides, such as data=fashion_mnist, or by --folder DIR")
    if path.exists() and path != settings.append:
        raise ValueError(f"{path} exists: verify the data against it, or give another name with --out")
    if settings.append is not None and path.resolve().parent != settings.append.resolve().parent:
        raise ValueError("--out must lie in the folder of --append, from which the paths in it are counted")
    before = None if settings.append is None else Manifest.read(settings.append)
    about = {"source": settings.source, "licence": settings.licence, "acquired": settings.acquired}
    if settings.folder is not None:
        name = _relative(settings.folder, path)
        parts = () if before is None else before.parts
        if Part("folder", (name,)) in [Part(part.kind, part.arguments) for part in parts]:
            raise ValueError(f"{settings.append} has {settings.folder} already: what was added needs its own folder")
        made = Manifest.of_folder(settings.folder, skip=[path], recorded_as=name, progress=_progress(), **about)
    else:
        data = load(list(settings.overrides))
        made = Manifest.of(
            data.dataset,
            label_of=data.label_of,
            schema=data.schema,
            overrides=settings.overrides,
            progress=_progress(),
            **about,
        )
    return made if before is None else before.joined(made)


def _found(settings: argparse.Namespace, recorded: Manifest, load: Load) -> Manifest:
    """The manifest of the data as they are."""
    if settings.overrides and settings.folder is not None:
        raise ValueError("name the data either by overrides or by --folder DIR, not by both")
    if settings.folder is not None:
        return Manifest.of_folder(settings.folder, skip=[settings.manifest], progress=_progress())
    if settings.overrides:
        return Manifest.of(load(list(settings.overrides)).dataset, progress=_progress())
    return reduce(Manifest.joined, [_again(part, settings.manifest, load) for part in recorded.parts])


def _again(part: Part, path: Path, load: Load) -> Manifest:
    """Read a part from where the manifest at ``path`` says."""
    if not part.arguments:
        raise ValueError(f"{path} does not say where its rows come from: name the data by overrides or by --folder")
    if part.kind == "folder":
        return Manifest.of_folder(path.parent / part.arguments[0], skip=[path], progress=_progress())
    for override in part.arguments:
        if not HARMLESS.fullmatch(override):
            raise ValueError(
                f"{path} names its data with {printable(override)!r:.200}, which could run code: "
                "if you trust it, repeat its overrides on the command line"
            )
    return Manifest.of(load(list(part.arguments)).dataset, progress=_progress())


def _relative(folder: Path, manifest: Path) -> str:
    """A folder as it is called from where the manifest lies, so that both may move together; absolute if given so."""
    if folder.is_absolute():
        return str(folder)
    return Path(os.path.relpath(folder, manifest.parent)).as_posix()


def _progress() -> Progress | None:
    if not sys.stderr.isatty():
        return None
    return lambda done, count: print(f"\r{done} of {count} rows", end="\n" if done == count else "", file=sys.stderr)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return " ".join(printable(line) for line in str(error).split("\n"))


def _say(text: str) -> None:
    """Print; whoever reads may stop reading at any time, which changes nothing about the verdict."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
