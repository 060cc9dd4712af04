"""Near duplicates with different labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.filters._check import given, number, whole
from robust_train.poisoning.filters._neighbours import neighbours
from robust_train.poisoning.filters.base import Filter, Rows, Scores, by_class


def near_conflicts(
    inputs: Tensor, labels: Tensor, classes: int, *, threshold: float = 0.2, k: int = 10, components: int = 64
) -> Tensor:
    """Share of a row's near duplicates, itself among them, that bear another label.

    A near duplicate is one of the k nearest contents, at a distance of at most ``threshold`` times the median distance
    to the nearest other content in the row's class; exact duplicates count as well.

    Args:
        inputs: ``(N, ...)`` of any real dtype, may be memory-mapped.
        labels: int64 ``(N,)``.
        classes: how many classes there are.
        threshold: relative to the class's typical distance, > 0.
        k: contents that are looked at around each row, >= 1.
        components: principal components of the flattened inputs between which distances are measured, >= 1.

    Returns:
        float32 ``(N,)`` in [0, 1); 0 for rows without a near duplicate of another label.
    """
    around = neighbours(inputs, labels, components=components, k=k)
    limit = torch.zeros(len(labels))
    if around.distances.shape[1] > 1:
        for index in by_class(labels, classes):
            if len(index):
                limit[index] = threshold * around.distances[index, 1].median()
    near = around.distances <= limit[:, None]
    return (around.others * near).sum(1) / ((around.sizes * near).sum(1) + 1)


@dataclass(frozen=True)
class NearDuplicates(Filter):
    """Rows that are almost equal, with different labels, by the raw inputs.

    Of a few almost equal rows those with the rarer label score highest; of two with different labels both get 0.5.
    Where most rows of a class have a near duplicate, as with stored augmentations, these are the typical distance, and
    only exact ones are found.

    Args:
        threshold: largest distance, relative to the typical distance to the nearest neighbour in a class, > 0.
        k: neighbours that are looked at, >= 1.
        components: principal components of the flattened inputs between which distances are measured, >= 1.

    Raises:
        ValueError: a setting is out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})
    finds: ClassVar[frozenset[str]] = frozenset({"duplicates"})

    threshold: float = 0.2
    k: int = 10
    components: int = 64

    def __post_init__(self) -> None:
        number("near_duplicates.threshold", self.threshold, above=0.0)
        whole("near_duplicates.k", self.k)
        whole("near_duplicates.components", self.components)

    def score(self, rows: Rows) -> Scores:
        return Scores(
            near_conflicts(
                given("inputs", rows.inputs),
                rows.labels,
                rows.classes,
                threshold=self.threshold,
                k=self.k,
                components=self.components,
            )
        )
