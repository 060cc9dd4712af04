"""What the filters of a run said of every row, and what was decided: a table (CSV), a report (JSON). Needs no torch."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from robust_train.poisoning._files import check_file, read_json, written_whole

KEEP, DROP, DOWNWEIGHT, QUARANTINE = "keep", "drop", "downweight", "quarantine"
DECISIONS = (KEEP, DROP, DOWNWEIGHT, QUARANTINE)

DECISIONS_FILE, REPORT_FILE, PICTURES_FILE = "filter_decisions.csv", "filter_report.json", "filter_suspicious.npy"

MOST_CLASSES = 1 << 20
SUSPICIOUS = 20  # rows that a summary lists for each filter
LARGEST_TABLE, LARGEST_REPORT = 1 << 32, 1 << 26  # bytes of a file that is read
CHUNK = 1 << 16  # rows that are parsed at a time

NAME = re.compile(r"\w[\w .+-]{0,79}", re.ASCII)
HEX = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class Column:
    """One filter's verdict on all N rows.

    Args:
        name: of the filter; letters, digits, spaces and ``_ . + -``.
        scores: suspicion, float ``(N,)``, finite; higher is more suspicious.
        threshold: score above which rows are flagged; None where no one number tells, or nothing was decided.
        flagged: bool ``(N,)``.
        calibration: how the threshold was found, anything that JSON can hold. The report shows ``method``,
            ``expected_fpr`` and ``power`` (in [0, 1]), ``note``, ``groups`` (a list of dicts with ``flagged``), and
            ``canary_scores`` (a list) of rows that were made suspicious on purpose.

    Raises:
        ValueError: a field is of another kind or shape.
    """

    name: str
    scores: np.ndarray
    threshold: float | None
    flagged: np.ndarray
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise ValueError(f"column.name must be letters, digits, spaces and _ . + - (80 at most), got {self.name!r}")
        object.__setattr__(self, "scores", np.asarray(self.scores, dtype=np.float64))
        object.__setattr__(self, "flagged", np.asarray(self.flagged))
        if self.scores.ndim != 1 or not np.isfinite(self.scores).all():
            raise ValueError(f"column.scores of {self.name} must be one finite number a row")
        if self.flagged.dtype != bool or self.flagged.shape != self.scores.shape:
            raise ValueError(f"column.flagged of {self.name} must be true or false for each of {len(self.scores)} rows")
        if self.threshold is not None:
            object.__setattr__(self, "threshold", float(self.threshold))
            if not np.isfinite(self.threshold):
                raise ValueError(f"column.threshold of {self.name} must be finite or None, got {self.threshold}")
        if not isinstance(self.calibration, Mapping):
            raise ValueError(f"column.calibration of {self.name} must be a dict, got {self.calibration!r:.80}")


@dataclass(frozen=True, eq=False)
class Decisions:
    """What was decided about each of N rows, and on what grounds.

    Args:
        labels: class indices >= 0, ``(N,)``.
        digests: SHA-256 of each row in hex; None where nobody computed them.
        columns: the filters' verdicts.
        decision: one of ``DECISIONS`` for each row.
        weights: how often a row is drawn in comparison to others, ``(N,)``: 0 where it is left out of training.

    Raises:
        ValueError: a field is of another kind or length, two columns have the same name, or a decision contradicts its
            weight (dropped and quarantined rows have weight 0, the others more).
    """

    labels: np.ndarray
    digests: list[str] | None
    columns: tuple[Column, ...]
    decision: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        for name, kind in (("labels", None), ("decision", np.str_), ("weights", np.float64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        object.__setattr__(self, "columns", tuple(self.columns))
        n = self.labels.size
        if self.labels.shape != (n,) or n == 0 or self.labels.dtype.kind not in "iu":
            raise ValueError("decisions.labels must be one class index a row, and at least one row")
        if self.labels.min() < 0 or self.labels.max() >= MOST_CLASSES:
            raise ValueError(f"decisions.labels must be class indices from 0 to {MOST_CLASSES - 1}")
        if self.digests is not None:
            object.__setattr__(self, "digests", list(self.digests))
            _check_digests(self.digests, n)
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError(f"decisions.columns must have different names, got {', '.join(names)}")
        for column in self.columns:
            if len(column.scores) != n:
                raise ValueError(f"decisions.columns: {column.name} has {len(column.scores)} scores for {n} rows")
        if self.decision.shape != (n,) or not np.isin(self.decision, DECISIONS).all():
            found = f"{np.unique(self.decision)[:6].tolist()} in shape {self.decision.shape}"
            raise ValueError(f"decisions.decision must be one of {', '.join(DECISIONS)} for each row, got {found:.200}")
        if self.weights.shape != (n,) or not (np.isfinite(self.weights).all() and (self.weights >= 0).all()):
            raise ValueError("decisions.weights must be one finite number >= 0 a row")
        if len(wrong := np.flatnonzero((self.weights == 0) != np.isin(self.decision, (DROP, QUARANTINE)))):
            row = int(wrong[0])
            raise ValueError(
                "decisions.weights must be 0 where a row is dropped or quarantined and > 0 elsewhere, got "
                f"{self.weights[row]:g} for row {row}: {self.decision[row]}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kept(self) -> np.ndarray:
        """Which rows are used for training, bool ``(N,)``."""
        return self.weights > 0


def summary(decisions: Decisions, classes: int) -> dict[str, Any]:
    """Counts and the most suspicious rows, as plain builtins.

    Args:
        decisions: of a run.
        classes: how many classes there are.

    Returns:
        ``rows``; ``kept``; ``expected_fpr``: highest share of clean rows that the calibrated thresholds together are
        expected to flag, the sum of the filters', None where no filter has one; ``decisions``: how many rows of each;
        ``classes``: for each class its ``label``, ``rows``
        and how many of each decision; ``filters``: for each by name ``flagged``, ``flagged_per_class`` (a list),
        ``threshold``, ``calibration``, and ``suspicious``: the rows with the highest scores, each with ``index``,
        ``label``, ``sha256`` (or None), ``score`` and ``decision``.

    Raises:
        ValueError: a label is none of the classes.
    """
    if (largest := int(decisions.labels.max())) >= classes:
        raise ValueError(f"classes must be more than the largest label, got {classes} and {largest}")
    made = {name: decisions.decision == name for name in DECISIONS}
    per_class = {name: np.bincount(decisions.labels[rows], minlength=classes).tolist() for name, rows in made.items()}
    rows = np.bincount(decisions.labels, minlength=classes).tolist()
    rates = [column.calibration.get("expected_fpr") for column in decisions.columns]
    known = [rate for rate in rates if isinstance(rate, (int, float)) and 0 <= rate <= 1]
    return {
        "rows": len(decisions),
        "kept": int(decisions.kept.sum()),
        "expected_fpr": min(1.0, sum(known)) if known else None,
        "decisions": {name: int(mask.sum()) for name, mask in made.items()},
        "classes": [
            {"label": c, "rows": rows[c], **{name: per_class[name][c] for name in DECISIONS}} for c in range(classes)
        ],
        "filters": {
            column.name: {
                "flagged": int(column.flagged.sum()),
                "flagged_per_class": np.bincount(decisions.labels[column.flagged], minlength=classes).tolist(),
                "threshold": column.threshold,
                "calibration": dict(column.calibration),
                "suspicious": [_row(decisions, column, row) for row in most_suspicious(column, SUSPICIOUS)],
            }
            for column in decisions.columns
        },
    }


def most_suspicious(column: Column, count: int) -> list[int]:
    """The numbers of the rows with the highest scores, highest first; of equal ones the first in the dataset."""
    return np.argsort(-column.scores, kind="stable")[:count].tolist()


def _row(decisions: Decisions, column: Column, row: int) -> dict[str, Any]:
    return {
        "index": row,
        "label": int(decisions.labels[row]),
        "sha256": None if decisions.digests is None else decisions.digests[row],
        "score": float(column.scores[row]),
        "decision": str(decisions.decision[row]),
    }


# --- the table ------------------------------------------------------------------------------------------------------


def write_decisions(path: str | Path, decisions: Decisions) -> None:
    """Write a table with a line for every row: ``index, sha256, label``, then ``score``, ``threshold`` and ``flagged``
    of each filter, ``decision, weight``. The filters' calibration is not in it but in the report.

    Guarantees:
        ``read_decisions`` finds the very numbers that were written. The file is written whole or not at all.
    """
    n = len(decisions)
    header, table = ["index", "sha256", "label"], [range(n), decisions.digests or repeat("", n)]
    table.append(decisions.labels.tolist())
    for column in decisions.columns:
        header += [f"{column.name}.{part}" for part in ("score", "threshold", "flagged")]
        threshold = "" if column.threshold is None else column.threshold
        table += [column.scores.tolist(), repeat(threshold, n), column.flagged.astype(np.int8).tolist()]
    table += [decisions.decision.tolist(), decisions.weights.tolist()]
    with written_whole(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, "decision", "weight"])
        writer.writerows(zip(*table, strict=True))


def read_decisions(path: str | Path) -> Decisions:
    """Read what ``write_decisions`` wrote. The columns' ``calibration`` is empty: see the report.

    Raises:
        ValueError: the file cannot be read, is too large, or is no such table; one line that names the file.
    """
    try:
        check_file(path, LARGEST_TABLE)
        with Path(path).open(encoding="utf-8", newline="") as file:
            return _decisions(csv.reader(file, strict=True))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from None


def _decisions(lines: Iterator[list[str]]) -> Decisions:
    header = next(lines, [])
    names = [name.removesuffix(".score") for name in header[3:-2:3]]
    parts = [f"{name}.{part}" for name in names for part in ("score", "threshold", "flagged")]
    if header != ["index", "sha256", "label", *parts, "decision", "weight"]:
        raise ValueError("this is no table of a filter's decisions: its first line names other columns")
    chunks, line = [], 2
    while chunk := list(islice(lines, CHUNK)):
        for row, cells in enumerate(chunk):
            if len(cells) != len(header):
                raise ValueError(f"line {line + row} has {len(cells)} cells, not {len(header)}")
        chunks.append([_parsed(name, cells) for name, cells in zip(header, zip(*chunk, strict=True), strict=True)])
        line += len(chunk)
    if not chunks:
        raise ValueError("the table has no rows")
    table = dict(zip(header, map(np.concatenate, zip(*chunks, strict=True)), strict=True))
    if (table["index"] != np.arange(len(table["index"]))).any():
        raise ValueError("column index must count the rows from 0 on, without gaps")
    return Decisions(
        labels=table["label"],
        digests=table["sha256"].tolist() if table["sha256"].any() else None,
        columns=tuple(
            Column(name, table[f"{name}.score"], _constant(name, table[f"{name}.threshold"]), table[f"{name}.flagged"])
            for name in names
        ),
        decision=table["decision"],
        weights=table["weight"],
    )


def _parsed(name: str, cells: Sequence[str]) -> np.ndarray:
    """A part of a column, as what its name says that it holds."""
    kind, texts = name.rpartition(".")[2], np.array(cells)
    if kind == "flagged":
        if not set(cells) <= {"0", "1"}:
            raise ValueError(f"column {name} must hold 0 and 1 only")
        return texts == "1"
    wanted = {"index": np.int64, "label": np.int64, "score": np.float64, "weight": np.float64}
    try:
        return texts.astype(wanted[kind]) if kind in wanted else texts
    except (ValueError, OverflowError):
        raise ValueError(f"column {name} must hold numbers only") from None


def _constant(name: str, texts: np.ndarray) -> float | None:
    if (texts != texts[0]).any():
        raise ValueError(f"column {name}.threshold must hold one and the same threshold in every row")
    return float(_parsed("score", texts[:1].tolist())[0]) if texts[0] else None


def _check_digests(digests: list[str], count: int) -> None:
    if len(digests) != count:
        raise ValueError(f"decisions.digests has {len(digests)} digests for {count} rows")
    for row, text in enumerate(digests):
        if not isinstance(text, str) or not HEX.fullmatch(text):
            raise ValueError(f"decisions.digests[{row}] must be 64 lower-case hex digits, got {text!r:.80}")


# --- the report -----------------------------------------------------------------------------------------------------


def write_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, whole or not at all, its keys in the order that they have.

    Raises:
        ValueError: it holds what JSON cannot hold (NaN and infinities among it).
    """
    try:
        text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the report cannot be written as JSON: {error}") from None
    with written_whole(path) as file:
        file.write(text + "\n")


def read_report(path: str | Path) -> dict[str, Any]:
    """Read what ``write_report`` wrote.

    Raises:
        ValueError: the file cannot be read, is too large, or holds no JSON object; one line that names the file.
    """
    report = read_json(path, LARGEST_REPORT)
    if not isinstance(report, dict):
        raise ValueError(f"{path}: this is no report of a filter")
    return report
