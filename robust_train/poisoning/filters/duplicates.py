"""Exact duplicates with different labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.filters._check import given
from robust_train.poisoning.filters._neighbours import Copies, contents
from robust_train.poisoning.filters.base import Filter, Rows, Scores


def label_conflicts(inputs: Tensor, labels: Tensor) -> Tensor:
    """1 for rows that are equal to others to the bit and bear a label that is not the most frequent one among them.

    Where several labels are equally frequent, all rows of that content get 1.

    Args:
        inputs: ``(N, ...)`` of any dtype, may be memory-mapped.
        labels: int64 ``(N,)``.

    Returns:
        float32 ``(N,)``, 0 or 1.
    """
    content = contents(inputs)
    copies = Copies(content, labels)
    own = copies.with_label(content, labels)
    most = torch.zeros(len(copies.sizes), dtype=torch.long).scatter_reduce(0, content, own, "amax")
    leading = own == most[content]  # rows whose label is a most frequent one; more of them than `most` mean a tie
    leaders = torch.zeros_like(most).scatter_add(0, content, leading.long())
    return (~leading | (leaders > most)[content]).float()


@dataclass(frozen=True)
class Duplicates(Filter):
    """Rows that occur more than once, with different labels.

    Guarantees:
        A row has score 1 if and only if an equal row with another label exists, and the row's own label is not more
        frequent among all equal rows than every other.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})
    finds: ClassVar[frozenset[str]] = frozenset({"duplicates"})

    def score(self, rows: Rows) -> Scores:
        return Scores(label_conflicts(given("inputs", rows.inputs), rows.labels))
