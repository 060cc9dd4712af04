"""Spectral signatures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.filters._check import given, whole
from robust_train.poisoning.filters._covariance import CHUNK, NEGLIGIBLE, Centred, principal_directions
from robust_train.poisoning.filters.base import Filter, Rows, Scores, by_class


def spectral_signatures(
    features: Tensor, labels: Tensor, classes: int, *, components: int = 1, chunk: int = CHUNK
) -> Tensor:
    """Squared projection of each row onto the direction in which its class varies most.

    It is divided by the median squared distance to the mean of the class, over all directions, so that it does not
    depend on the scale of a class, and a cluster of fewer than half of the rows does not hide behind its own variance.

    Args:
        features: ``(N, D)`` of any real dtype, may be memory-mapped.
        labels: int64 ``(N,)``.
        classes: how many classes there are.
        components: directions that are summed over, >= 1; the paper has one.
        chunk: elements that are held in memory at a time.

    Returns:
        float32 ``(N,)``, >= 0; 0 in a class of fewer than three rows, or whose rows do not differ.

    Reference:
        Tran et al., "Spectral Signatures in Backdoor Attacks", 2018, algorithm 1.
    """
    values = torch.zeros(len(labels))
    for index in by_class(labels, classes):
        rows = Centred(features, index, chunk)
        if rows.spread > 0.0 and len(rows) > 2:
            _, directions = principal_directions(rows, components)
            usual = float(rows.squares.median())
            if usual <= NEGLIGIBLE * rows.spread:  # most rows are the same
                usual = rows.spread
            values[index] = rows.onto(directions).square().sum(1) / usual
    return values


@dataclass(frozen=True)
class Spectral(Filter):
    """Rows that stand out in the direction in which the features of their class vary most.

    For backdoors with a common trigger, from about one row in a hundred on; weak against rare ones.

    Args:
        components: directions that are summed over, >= 1.

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Tran et al., "Spectral Signatures in Backdoor Attacks", 2018, algorithm 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    finds: ClassVar[frozenset[str]] = frozenset({"backdoor"})

    components: int = 1

    def __post_init__(self) -> None:
        whole("spectral.components", self.components)

    def score(self, rows: Rows) -> Scores:
        features = given("features", rows.features)
        return Scores(spectral_signatures(features, rows.labels, rows.classes, components=self.components))
