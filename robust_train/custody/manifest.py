"""The record of a dataset: a digest a row, one root over all of them, where the rows came from. Plain JSON."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

from robust_train.custody._files import read_json, write_whole
from robust_train.custody.difference import Difference, difference
from robust_train.custody.digest import Progress, digests
from robust_train.custody.folder import folder_digests
from robust_train.custody.merkle import merkle_root

FORMAT, VERSION = "robust-train/manifest", 1
LARGEST = 1 << 30  # bytes of a file that is read: about ten million rows
KINDS = ("dataset", "folder")

LabelOf = Callable[[Any], "int | str"]


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a manifest that were added together.

    Args:
        kind: ``"dataset"`` or ``"folder"``.
        arguments: how to read them again: the overrides that name the dataset, or the one path of the folder; empty
            where only the caller knows.
        count: number of rows.
        source: where the data came from, for people.
        licence: under which they may be used.
        acquired: the day, ``YYYY-MM-DD``; empty if not known.

    Raises:
        ValueError: a field is of another kind.
    """

    kind: str = "dataset"
    arguments: tuple[str, ...] = ()
    count: int = 0
    source: str = ""
    licence: str = ""
    acquired: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", _texts("part.arguments", self.arguments))
        if self.kind not in KINDS:
            raise ValueError(f"part.kind must be one of {', '.join(KINDS)}, got {self.kind!r:.80}")
        _check_count("part.count", self.count)
        for name in ("source", "licence", "acquired"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"part.{name} must be a text, got {value!r:.80}")
        if self.acquired and not _is_day(self.acquired):
            raise ValueError(f"part.acquired must be a day such as 2024-12-31, got {self.acquired!r:.80}")


@dataclass(frozen=True)
class Manifest:
    """What a dataset was, row by row. ``Manifest.of`` and ``Manifest.of_folder`` make one.

    Args:
        root: Merkle tree hash of the digests, in hex.
        digests: of each row, in order, in hex.
        count: number of rows.
        parts: which rows came from where, in order; at least one.
        classes: how many rows each label has; rows whose label nobody told are in none.
        schema: what the caller knows of a row's shape, types and ranges; anything that JSON can hold.
        names: of each row, where rows are files (``""`` for others); empty where no row is.
        version: of the format.

    Raises:
        ValueError: a field is of another kind, or they contradict one another.

    Guarantees:
        ``root`` is the Merkle tree hash (RFC 6962) of the rows' digests, and ``count`` their number.
    """

    root: str
    digests: tuple[str, ...]
    count: int
    parts: tuple[Part, ...]
    classes: Mapping[str, int] = field(default_factory=dict)
    schema: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != VERSION:
            raise ValueError(f"manifest.version must be {VERSION}, got {self.version!r:.80}")
        object.__setattr__(self, "digests", _texts("manifest.digests", self.digests))
        object.__setattr__(self, "names", _texts("manifest.names", self.names))
        object.__setattr__(self, "parts", tuple(self.parts))
        for row, text in enumerate(self.digests):
            if not _HEX.fullmatch(text):
                raise ValueError(f"manifest.digests[{row}] must be 64 lower-case hex digits, got {text!r:.80}")
        _check_count("manifest.count", self.count)
        if self.count != len(self.digests):
            raise ValueError(f"manifest.count is {self.count}, but there are {len(self.digests)} digests")
        if len(self.names) not in (0, self.count):
            raise ValueError(f"manifest.names must have one name a row or none, got {len(self.names)} of {self.count}")
        if not self.parts or sum(part.count for part in self.parts) != self.count:
            raise ValueError(f"manifest.parts must be at least one, and have {self.count} rows together")
        if not isinstance(self.classes, dict) or not all(isinstance(label, str) for label in self.classes):
            raise ValueError(f"manifest.classes must be a dict of counts, got {self.classes!r:.80}")
        for label, n in self.classes.items():
            _check_count(f"manifest.classes[{label!r:.40}]", n)
        if sum(self.classes.values()) > self.count:
            raise ValueError(f"manifest.classes has more than {self.count} rows")
        _check_schema(self.schema)
        if self.root != (found := _root(self.digests)):
            raise ValueError(f"manifest.root is {self.root!r:.80}, but the root of its digests is {found}")

    @property
    def source(self) -> str:
        """Where the data came from; of several parts with ``"; "`` between them."""
        return self._joint("source")

    @property
    def licence(self) -> str:
        """Under which licences the data may be used."""
        return self._joint("licence")

    @property
    def acquired(self) -> str:
        """On which days the data were acquired."""
        return self._joint("acquired")

    def _joint(self, name: str) -> str:
        return "; ".join(dict.fromkeys(text for part in self.parts if (text := getattr(part, name))))

    # --- making one -----------------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        dataset: Any,
        *,
        label_of: LabelOf | None = None,
        source: str = "",
        licence: str = "",
        schema: Mapping[str, Any] | None = None,
        acquired: str = "",
        overrides: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> Manifest:
        """The manifest of a dataset.

        Args:
            dataset: has ``len(dataset)`` and ``dataset[i]``, and gives the same example each time.
            label_of: the label in an example, a whole number or a text; None: labels are not counted.
            source: where the data came from, for people.
            licence: under which they may be used.
            schema: what is known of a row; anything that JSON can hold.
            acquired: the day, ``YYYY-MM-DD``.
            overrides: that name the dataset to ``robust-train``.
            progress: called with the number of rows done and of all rows.

        Raises:
            TypeError: the dataset has no length, or an example holds something that has no digest.
            ValueError: examples change from one reading to the next, a label is of another kind, or a setting is.
        """
        classes: Counter[str] = Counter()

        def count_label(row: int, example: Any) -> None:
            label = label_of(example) if label_of is not None else None
            if not isinstance(label, (int, str)):
                raise ValueError(f"label_of must give a whole number or a text, got {label!r:.80} for row {row}")
            classes[str(label)] += 1

        rows = digests(dataset, progress, None if label_of is None else count_label)
        part = Part("dataset", tuple(overrides), len(rows), source, licence, acquired)
        return _manifest(tuple(row.hex() for row in rows), (part,), dict(classes), schema or {}, ())

    @classmethod
    def of_folder(
        cls,
        folder: str | Path,
        *,
        skip: Collection[str | Path] = (),
        source: str = "",
        licence: str = "",
        schema: Mapping[str, Any] | None = None,
        acquired: str = "",
        recorded_as: str | None = None,
        progress: Progress | None = None,
    ) -> Manifest:
        """The manifest of the files below a folder, one a row, sorted by name.

        Args:
            folder: where the files lie.
            skip: files that are not data, such as the manifest itself.
            source: where the data came from, for people.
            licence: under which they may be used.
            schema: what is known of a file; anything that JSON can hold.
            acquired: the day, ``YYYY-MM-DD``.
            recorded_as: how the folder is called in the manifest; None: as ``folder`` is.
            progress: called with the number of files done and of all files.

        Raises:
            ValueError: the folder is none, or holds what is no data (see ``folder_digests``).
            OSError: something in it cannot be read.
        """
        names, rows = folder_digests(folder, skip=skip, progress=progress)
        arguments = (os.fspath(folder) if recorded_as is None else recorded_as,)
        part = Part("folder", arguments, len(rows), source, licence, acquired)
        return _manifest(tuple(row.hex() for row in rows), (part,), {}, schema or {}, tuple(names))

    def extended(
        self,
        dataset: Any,
        *,
        label_of: LabelOf | None = None,
        source: str = "",
        licence: str = "",
        acquired: str = "",
        overrides: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> Manifest:
        """With further rows at the end, which alone are read. The arguments are those of ``of``.

        Guarantees:
            Has the root, digests and classes that ``of`` has for all the rows at once.
        """
        return self.joined(
            Manifest.of(
                dataset,
                label_of=label_of,
                source=source,
                licence=licence,
                acquired=acquired,
                overrides=overrides,
                progress=progress,
            )
        )

    def joined(self, other: Manifest) -> Manifest:
        """The rows of both, in this order.

        Raises:
            ValueError: the two have different schemas.
        """
        if self.schema and other.schema and self.schema != other.schema:
            raise ValueError("the schema of the added rows must be that of the manifest, or empty")
        names: tuple[str, ...] = ()
        if self.names or other.names:
            names = (*(self.names or ("",) * self.count), *(other.names or ("",) * other.count))
        return _manifest(
            (*self.digests, *other.digests),
            (*self.parts, *other.parts),
            dict(Counter(self.classes) + Counter(other.classes)),
            self.schema or other.schema,
            names,
        )

    # --- as JSON --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As plain builtins: what the file holds."""
        return {
            "format": FORMAT,
            "version": self.version,
            "root": self.root,
            "count": self.count,
            "parts": [{**asdict(part), "arguments": list(part.arguments)} for part in self.parts],
            "classes": dict(self.classes),
            "schema": dict(self.schema),
            "names": list(self.names),
            "digests": list(self.digests),
        }

    @classmethod
    def from_dict(cls, state: Any) -> Manifest:
        """A manifest from what ``to_dict`` returned.

        Raises:
            ValueError: it is no such thing; the message says what is wrong.
        """
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"this is no manifest of data (its format is not {FORMAT})")
        if state.get("version") != VERSION:
            raise ValueError(f"version {state.get('version')!r:.80} of its format is not known, only {VERSION}")
        own = {**state}
        del own["format"]
        _check_keys("the manifest", own, {f.name for f in fields(cls)})
        if not isinstance(own["parts"], list):
            raise ValueError("manifest.parts must be a list")
        for part in own["parts"]:
            _check_keys("a part", part, {f.name for f in fields(Part)})
        return cls(**{**own, "parts": tuple(Part(**part) for part in own["parts"])})

    def write(self, path: str | Path) -> None:
        """Write the file whole or not at all: no reader ever sees half of it."""
        write_whole(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """A manifest from its file, every field checked and the root computed again.

        Raises:
            ValueError: the file cannot be read, is too large, no JSON, or no manifest; one line that names the file.
        """
        try:
            return cls.from_dict(read_json(path, LARGEST))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from None


def compare(recorded: Manifest, found: Manifest) -> Difference:
    """Which rows are not what they were (see ``difference``).

    Args:
        recorded: the manifest that was written.
        found: one of the data as they are now.
    """
    return difference(recorded.digests, found.digests, recorded.names, found.names)


_HEX = re.compile("[0-9a-f]{64}")


def _manifest(
    rows: tuple[str, ...],
    parts: tuple[Part, ...],
    classes: dict[str, int],
    schema: Mapping[str, Any],
    names: tuple[str, ...],
) -> Manifest:
    return Manifest(_root(rows), rows, len(rows), parts, dict(sorted(classes.items())), dict(schema), names)


def _root(rows: Sequence[str]) -> str:
    return merkle_root([bytes.fromhex(row) for row in rows]).hex()


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} must be a list of texts, got {value!r:.80}")
    return tuple(value)


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be a whole number >= 0, got {value!r:.80}")


def _check_keys(what: str, state: Any, names: set[str]) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"{what} must be a dict, got {state!r:.80}")
    if wrong := names ^ state.keys():
        raise ValueError(f"{what} must have the entries {', '.join(sorted(names))}; wrong: {', '.join(sorted(wrong))}")


def _check_schema(schema: Any) -> None:
    try:
        same = isinstance(schema, dict) and json.loads(json.dumps(schema, allow_nan=False)) == schema
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise ValueError(f"manifest.schema must be a dict of what JSON can hold, got {schema!r:.80}")


def _is_day(text: str) -> bool:
    try:
        return len(text) == len("2024-12-31") and bool(date.fromisoformat(text))
    except ValueError:
        return False
