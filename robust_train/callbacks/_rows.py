"""The rows of a batch that a validation looks at, and the file in which it lists those it took out."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from robust_train.callbacks import _batch
from robust_train.callbacks._callback import place_text
from robust_train.poisoning.checks import Violation, digests

COLUMNS = ("stage", "epoch", "batch", "row", "rules", "label", "sha256")
BATCH = 64  # rows of a batch that is made of a trusted dataset


@dataclass(frozen=True)
class Place:
    """Which batch of a run it is."""

    stage: str
    epoch: int
    batch: int
    loader: int = 0

    def __str__(self) -> str:
        loader = f" of loader {self.loader}" if self.loader else ""
        return f"DataValidation: {self.stage} batch {self.batch}{loader} in epoch {self.epoch}"


@dataclass(frozen=True)
class Rows:
    """Inputs and labels of a batch, or of one loader's part of it.

    Attributes:
        x: inputs ``(B, ...)``.
        y: labels ``(B, ...)``; None where there are none.
        batch: the part that they were found in.
        part: where that lies in the whole batch.
        found: where inputs and labels lie, in words.
    """

    x: Tensor
    y: Tensor | None
    batch: Any
    part: _batch.Path
    found: str

    def kept(self, index: Tensor) -> Rows:
        """Only some rows, in every tensor and list of the part."""
        y = None if self.y is None else self.y[index.to(self.y.device)]
        batch = _batch.take(self.batch, index, len(self.x))
        return replace(self, x=self.x[index.to(self.x.device)], y=y, batch=batch)

    def in_batch(self, batch: Any) -> Any:
        """The whole batch with this part in place of its own; nothing is written into the user's."""
        return _batch.replaced(batch, self.part, self.batch)


def find_rows(batch: Any, inputs: str | int | None, labels: str | int | None, stage: str, loaders: Any = None) -> Rows:
    """Inputs and labels of a batch.

    Args:
        batch: what the step receives.
        inputs: see ``DataValidation``.
        labels: see ``DataValidation``.
        stage: for the message.
        loaders: the collection of loaders whose batches it holds, in the same structure; None: it comes from one.

    Raises:
        ValueError: there are no such tensors, or they have not equally many rows.
    """
    try:
        path = _batch.find_input(batch, inputs)
        part = path[: _depth(loaders, path)]
        own, x = _batch.get(batch, part), _batch.get(batch, path)
        if x.ndim == 0:
            raise ValueError("the inputs are a single number, which has no rows")
        if labels is not None:
            where = _batch.label_candidates(batch, path, labels)[0]
            y = _batch.get(batch, where)
            if y.ndim == 0 or len(y) != len(x):
                raise ValueError(f"the inputs have {len(x)} rows, and the labels the shape {tuple(y.shape)}")
        else:
            candidates = [(*part, *p) for p in _batch.label_candidates(own, path[len(part) :])]
            fitting = [p for p in candidates if _batch.get(batch, p).shape[:1] == x.shape[:1]]
            where, y = (fitting[0], _batch.get(batch, fitting[0])) if fitting else (None, None)
    except ValueError as error:
        raise ValueError(
            f"DataValidation cannot read a {stage} batch: {error}. Name its tensors with inputs=… and labels=…"
            + (", or leave validation batches out with check_val=False" if stage == "validation" else "")
        ) from None
    labelled = "without labels" if where is None else f"labels {place_text(where)}"
    return Rows(x, y, own, part, f"inputs {place_text(path)}, {labelled}")


def leaves(loaders: Any) -> int:
    """How many loaders there are in a collection, or in none."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return sum(map(leaves, loaders)) if isinstance(loaders, (list, tuple)) else 1


def is_through(batch: Any, inputs: str | int | None, loaders: Any) -> bool:
    """Whether the loader that ``inputs`` leads to has no batch left, where others of the collection have."""
    if inputs is None:
        return False
    keys = str(inputs).split(".")
    path: _batch.Path = tuple(int(key) if key.lstrip("-").isdigit() else key for key in keys)
    try:
        return _batch.get(batch, path[: _depth(loaders, path)]) is None
    except (KeyError, IndexError, TypeError):
        return False  # what is wrong, find_rows says


def trusted_batches(trusted: Any, count: int) -> Iterable[Any]:
    """Batches of a trusted dataset, spread evenly over its rows; loaders and lists of batches are taken as they are."""
    if not isinstance(trusted, Dataset):
        return trusted
    if isinstance(trusted, IterableDataset):
        return DataLoader(trusted, batch_size=BATCH)
    size = len(trusted)  # type: ignore[arg-type]
    chosen = torch.linspace(0, size - 1, min(size, count * BATCH), dtype=torch.float64).round().long().tolist()
    return DataLoader(Subset(trusted, chosen), batch_size=BATCH)


def write_quarantine(path: Path, place: Place, rows: Rows, violations: list[Violation]) -> None:
    """Append a line for each row that was taken out; a batch's lines are written at once.

    Args:
        path: of the file, which is begun with a header.
        place: of the batch.
        rows: of the batch, as it was.
        violations: what is wrong with which of them.
    """
    rules: dict[int, list[str]] = {}
    for violation in violations:
        for row in violation.rows:
            rules.setdefault(row, []).append(violation.rule)
    index = torch.tensor(sorted(rules))
    content = digests(rows.x[index.to(rows.x.device)])
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        out.writerow(COLUMNS)
    for row, digest in zip(sorted(rules), content, strict=True):
        label = rows.y[row].item() if rows.y is not None and rows.y[row].numel() == 1 else ""
        out.writerow([place.stage, place.epoch, place.batch, row, " ".join(rules[row]), label, digest.hex()])
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, text.getvalue().encode())
    finally:
        os.close(file)


def _depth(loaders: Any, path: _batch.Path) -> int:
    """How many keys of a path lead through a collection of loaders to the batch of one."""
    depth = 0
    while isinstance(loaders, (Mapping, list, tuple)) and depth < len(path):
        loaders = loaders[path[depth]]  # type: ignore[index]
        depth += 1
    return depth
