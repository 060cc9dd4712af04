"""Disagreement with the nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.filters._check import given, whole
from robust_train.poisoning.filters._neighbours import neighbours
from robust_train.poisoning.filters.base import Filter, Rows, Scores


def disagreement(inputs: Tensor, labels: Tensor, *, k: int = 10, components: int = 64) -> Tensor:
    """Share of the k nearest other rows that bear another label.

    Where the k-th neighbour is one of several copies, these share what is left of the k places.

    Args:
        inputs: ``(N, ...)`` of any real dtype, may be memory-mapped.
        labels: int64 ``(N,)``.
        k: neighbours, >= 1; all other rows where there are fewer.
        components: principal components of the flattened inputs between which distances are measured, >= 1.

    Returns:
        float32 ``(N,)`` in [0, 1]; 0 for a single row.
    """
    around = neighbours(inputs, labels, components=components, k=k)
    nearer = around.sizes.cumsum(1) - around.sizes
    counted = torch.minimum((k - nearer).clamp_min(0), around.sizes)
    differing = counted * around.others / around.sizes.clamp_min(1)
    return differing.sum(1) / counted.sum(1).clamp_min(1)


@dataclass(frozen=True)
class KNNLabels(Filter):
    """Rows whose neighbours bear another label, neighbours by the raw inputs.

    No model is asked, so that none can have learned the trigger or memorised the wrong labels. It needs inputs whose
    distances mean something, such as small centred images or tables of numbers of one scale. The search is exact and
    takes time proportional to the square of the number of rows; faiss, if installed, does it faster.

    Args:
        k: neighbours, >= 1.
        components: principal components of the flattened inputs between which distances are measured, >= 1.

    Raises:
        ValueError: a setting is out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})
    finds: ClassVar[frozenset[str]] = frozenset({"label_noise", "backdoor"})

    k: int = 10
    components: int = 64

    def __post_init__(self) -> None:
        whole("knn_labels.k", self.k)
        whole("knn_labels.components", self.components)

    def score(self, rows: Rows) -> Scores:
        inputs = given("inputs", rows.inputs)
        return Scores(disagreement(inputs, rows.labels, k=self.k, components=self.components))
