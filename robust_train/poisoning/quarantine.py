"""The rows that filters left out of training, and those that a person put back: plain JSON. Needs no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from robust_train.poisoning._files import read_json, written_whole
from robust_train.poisoning.records import DROP, HEX, NAME, QUARANTINE, Decisions

FORMAT, VERSION = "robust-train/quarantine", 1
FILE = "quarantine.json"
QUARANTINED, RESTORED = "quarantined", "restored"
LARGEST = 1 << 30  # bytes of a file that is read
LONGEST = 2000  # characters of a text in the history


@dataclass(frozen=True)
class Event:
    """Something that a person did about an entry.

    Args:
        when: date and time, UTC.
        who: a user's name.
        what: ``"restored"``.
        reason: in the person's words.

    Raises:
        ValueError: a field is no text of at most 2000 characters.
    """

    when: str = ""
    who: str = ""
    what: str = RESTORED
    reason: str = ""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, str) or len(value) > LONGEST:
                raise ValueError(f"event.{name} must be a text of at most {LONGEST} characters, got {value!r:.80}")


@dataclass(frozen=True)
class Entry:
    """One row that was left out.

    Args:
        index: its number in the dataset.
        sha256: of its content, in hex; None where nobody computed it.
        label: its class.
        filters: names of the filters that flagged it.
        scores: what each filter said of it.
        decision: ``"quarantine"`` or ``"drop"``.
        status: ``"quarantined"``, or ``"restored"`` once a person put it back.
        history: what people did about it, oldest first.

    Raises:
        ValueError: a field is of another kind.
    """

    index: int
    sha256: str | None
    label: int
    filters: tuple[str, ...]
    scores: Mapping[str, float]
    decision: str = QUARANTINE
    status: str = QUARANTINED
    history: tuple[Event, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("index", "label"):
            if not _is_count(value := getattr(self, name)):
                raise ValueError(f"entry.{name} must be a whole number >= 0, got {value!r:.80}")
        if self.sha256 is not None and not (isinstance(self.sha256, str) and HEX.fullmatch(self.sha256)):
            raise ValueError(f"entry.sha256 must be 64 lower-case hex digits or null, got {self.sha256!r:.80}")
        for name in ("filters", "history"):
            if not isinstance(value := getattr(self, name), (list, tuple)):
                raise ValueError(f"entry.{name} must be a list, got {value!r:.80}")
            object.__setattr__(self, name, tuple(value))
        if not isinstance(self.scores, dict):
            raise ValueError(f"entry.scores must be a dict, got {self.scores!r:.80}")
        for name in (*self.filters, *self.scores):
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError(f"entry {self.index}: {name!r:.80} is no name of a filter")
        for name, score in self.scores.items():
            if type(score) not in (int, float) or not math.isfinite(score):
                raise ValueError(f"entry.scores[{name!r}] must be a finite number, got {score!r:.80}")
        for name, allowed in (("decision", (QUARANTINE, DROP)), ("status", (QUARANTINED, RESTORED))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"entry.{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r:.80}")
        if not all(isinstance(event, Event) for event in self.history):
            raise ValueError("entry.history must hold events only")


@dataclass(frozen=True)
class Quarantine:
    """All rows that a run left out of its training data. ``Quarantine.of`` makes one.

    Args:
        root: root of the manifest of the data, 64 hex digits; None where nobody computed it.
        rows: how many rows the dataset had.
        classes: how many classes.
        entries: the rows, by ascending number.
        version: of the format.

    Raises:
        ValueError: a field is of another kind, entries are not in order, or some have a digest and others none.

    Guarantees:
        ``Quarantine.read`` of what ``write`` wrote is equal to it.
    """

    root: str | None
    rows: int
    classes: int
    entries: tuple[Entry, ...]
    version: int = VERSION

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != VERSION:
            raise ValueError(f"quarantine.version must be {VERSION}, got {self.version!r:.80}")
        if self.root is not None and not (isinstance(self.root, str) and HEX.fullmatch(self.root)):
            raise ValueError(f"quarantine.root must be 64 lower-case hex digits or null, got {self.root!r:.80}")
        for name in ("rows", "classes"):
            if not _is_count(value := getattr(self, name)):
                raise ValueError(f"quarantine.{name} must be a whole number >= 0, got {value!r:.80}")
        object.__setattr__(self, "entries", tuple(self.entries))
        last = -1
        for entry in self.entries:
            if not last < entry.index < self.rows:
                raise ValueError(f"quarantine.entries must ascend and lie below {self.rows}, got {entry.index}")
            if entry.label >= self.classes:
                raise ValueError(f"quarantine.entries: row {entry.index} has label {entry.label} of {self.classes}")
            last = entry.index
        if len({entry.sha256 is None for entry in self.entries}) > 1:
            raise ValueError("quarantine.entries must all have a sha256, or none of them")

    @classmethod
    def of(
        cls, decisions: Decisions, *, classes: int, root: str | None = None, before: Quarantine | None = None
    ) -> Quarantine:
        """The rows that are dropped or quarantined.

        Args:
            decisions: of a run.
            classes: how many classes there are.
            root: of the data's manifest; without one and without digests no row can be restored in another run.
            before: the quarantine whose restored rows the run kept: they stay on record, with their history.

        Raises:
            ValueError: the restored rows cannot be found again (see ``restored``).
        """
        back = np.zeros(len(decisions), dtype=bool)
        earlier: dict[str | int, Entry] = {}
        if before is not None:
            back = before.restored(len(decisions), digests=decisions.digests, root=root) & decisions.kept
            known = [entry for entry in before.entries if entry.status == RESTORED]
            earlier = {key: entry for entry in known for key in (entry.index, entry.sha256) if key is not None}
        entries = []
        for row in np.flatnonzero(~decisions.kept | back).tolist():
            digest = None if decisions.digests is None else decisions.digests[row]
            entry = Entry(
                index=row,
                sha256=digest,
                label=int(decisions.labels[row]),
                filters=tuple(column.name for column in decisions.columns if column.flagged[row]),
                scores={column.name: float(column.scores[row]) for column in decisions.columns},
                decision=QUARANTINE if back[row] else str(decisions.decision[row]),
            )
            if back[row]:
                was = earlier[digest] if digest is not None and digest in earlier else earlier[row]
                entry = replace(entry, decision=was.decision, status=RESTORED, history=was.history)
            entries.append(entry)
        return cls(root, len(decisions), classes, tuple(entries))

    @property
    def filters(self) -> list[str]:
        """Names of the filters, in order."""
        return list(dict.fromkeys(name for entry in self.entries for name in (*entry.scores, *entry.filters)))

    def counts(self) -> dict[str, int]:
        """How many entries have which status."""
        found = Counter(entry.status for entry in self.entries)
        return {status: found[status] for status in (QUARANTINED, RESTORED)}

    # --- putting rows back ----------------------------------------------------------------------------------------

    def restore(self, indices: Iterable[int], *, reason: str = "", who: str = "", when: str = "") -> Quarantine:
        """Put rows back; those that are back already stay as they are.

        Args:
            indices: their numbers in the dataset.
            reason: why, for whoever asks later.
            who: did it.
            when: date and time.

        Raises:
            ValueError: a number is not among the entries.
        """
        wanted = set(indices)
        if unknown := sorted(wanted - {entry.index for entry in self.entries}):
            some = ", ".join(map(str, unknown[:5])) + (", …" if len(unknown) > 5 else "")
            raise ValueError(f"no entry has the index {some}: only rows of the quarantine can be restored")
        event = Event(when, who, RESTORED, reason)
        return replace(
            self,
            entries=tuple(
                replace(entry, status=RESTORED, history=(*entry.history, event))
                if entry.index in wanted and entry.status == QUARANTINED
                else entry
                for entry in self.entries
            ),
        )

    def mask(self, n: int) -> np.ndarray:
        """Which rows may be used: bool ``(n,)``, False for those that are quarantined still.

        Raises:
            ValueError: the dataset had another number of rows.
        """
        if n != self.rows:
            raise ValueError(f"the quarantine is of a dataset of {self.rows} rows, not of {n}")
        keep = np.ones(n, dtype=bool)
        keep[[entry.index for entry in self.entries if entry.status == QUARANTINED]] = False
        return keep

    def restored(self, n: int, *, digests: Sequence[str] | None = None, root: str | None = None) -> np.ndarray:
        """Which rows of a dataset a person put back, whatever filters say of them.

        Rows are told by their content: all that have the digest of a restored entry are put back, also in a dataset
        that has grown. Without digests they are told by their number, in the very same data only.

        Args:
            n: rows of the dataset.
            digests: of its rows, in hex; None: nobody computed them.
            root: of its manifest.

        Returns:
            bool ``(n,)``.

        Raises:
            ValueError: there is something to restore, digests are missing, and the data are not known to be the same.
        """
        back = [entry for entry in self.entries if entry.status == RESTORED]
        mask = np.zeros(n, dtype=bool)
        if not back:
            return mask
        if digests is not None and back[0].sha256 is not None:
            if len(digests) != n:
                raise ValueError(f"there are {len(digests)} digests for {n} rows")
            contents = {entry.sha256 for entry in back}
            return np.fromiter((digest in contents for digest in digests), dtype=bool, count=n)
        if root is None or root != self.root or n != self.rows:
            raise ValueError(
                f"the quarantine is of {self.rows} rows with root {self.root}, the data are {n} rows with root {root}: "
                "its restored rows cannot be found again without digests of all rows on both sides"
            )
        mask[[entry.index for entry in back]] = True
        return mask

    def selected(self, *, by: str | None = None, label: int | None = None) -> list[Entry]:
        """Entries that a filter flagged, the highest of its scores first; or those of a class; or both; or all.

        Raises:
            ValueError: there is no such filter, or no such class.
        """
        if by is not None and by not in self.filters:
            raise ValueError(f"no filter is called {by!r}; there are: {', '.join(self.filters) or 'none'}")
        if label is not None and not 0 <= label < self.classes:
            raise ValueError(f"class {label} is none of 0 to {self.classes - 1}")
        found = [e for e in self.entries if (by is None or by in e.filters) and label in (None, e.label)]
        return found if by is None else sorted(found, key=lambda entry: -entry.scores.get(by, -math.inf))

    # --- as JSON --------------------------------------------------------------------------------------------------

    def write(self, path: str | Path) -> None:
        """Write the file whole or not at all, an entry a line."""
        head = {"format": FORMAT, **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "entries"}}
        lines = ",\n".join(json.dumps(asdict(entry), allow_nan=False) for entry in self.entries)
        with written_whole(path) as file:
            file.write(json.dumps(head, indent=1)[:-2] + f',\n "entries": [\n{lines}\n]}}\n')

    @classmethod
    def from_dict(cls, state: Any) -> Quarantine:
        """A quarantine from what a file holds.

        Raises:
            ValueError: it is no such thing; the message says what is wrong.
        """
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"this is no quarantine (its format is not {FORMAT})")
        if state.get("version") != VERSION:
            raise ValueError(f"version {state.get('version')!r:.80} of its format is not known, only {VERSION}")
        own = {name: value for name, value in state.items() if name != "format"}
        _check_keys("the quarantine", own, cls)
        return cls(**{**own, "entries": tuple(map(_entry, _list("quarantine.entries", own["entries"])))})

    @classmethod
    def read(cls, path: str | Path) -> Quarantine:
        """A quarantine from its file, or from the folder of the run that wrote it.

        Raises:
            ValueError: the file cannot be read, is too large, no JSON, or no quarantine; one line that names the file.
        """
        path = file_of(path)
        state = read_json(path, LARGEST)
        try:
            return cls.from_dict(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def file_of(path: str | Path) -> Path:
    """The file itself, where ``path`` may be the folder of a run."""
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def _entry(state: Any) -> Entry:
    _check_keys("an entry", state, Entry)
    events = []
    for event in _list("entry.history", state["history"]):
        _check_keys("an event", event, Event)
        events.append(Event(**event))
    return Entry(**{**state, "history": tuple(events)})


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {value!r:.80}")
    return value


def _check_keys(what: str, state: Any, kind: type) -> None:
    names: Collection[str] = {f.name for f in fields(kind)}
    if not isinstance(state, dict):
        raise ValueError(f"{what} must be an object, got {state!r:.80}")
    if wrong := sorted(names ^ state.keys()):
        raise ValueError(f"{what} lacks or has too much: {', '.join(wrong)[:200]}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
