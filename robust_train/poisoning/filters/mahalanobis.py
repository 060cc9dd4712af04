"""Robust Mahalanobis distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.filters._check import given, number, whole
from robust_train.poisoning.filters._covariance import CHUNK, Centred, robust_whitened
from robust_train.poisoning.filters.base import Filter, Rows, Scores, by_class


def mahalanobis_distance(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    components: int = 16,
    trim: float = 0.35,
    rounds: int = 20,
    shrinkage: float = 0.05,
    chunk: int = CHUNK,
) -> Tensor:
    """Squared distance of each row to the centre of its class, in units of the class's robust covariance.

    Args:
        features: ``(N, D)`` of any real dtype, may be memory-mapped.
        labels: int64 ``(N,)``.
        classes: how many classes there are.
        components: principal components of a class that count, >= 1.
        trim: share of a class that is left out of centre and covariance, in (0, 1).
        rounds: how often these are computed, >= 1.
        shrinkage: weight of the plain covariance in the robust one, in (0, 1).
        chunk: elements that are held in memory at a time.

    Returns:
        float32 ``(N,)``, >= 0, divided by the number of components; 0 in a class whose rows do not differ, or are
        fewer than about sixteen.

    Reference:
        Rousseeuw and Van Driessen, "A Fast Algorithm for the Minimum Covariance Determinant Estimator", 1999.
    """
    values = torch.zeros(len(labels))
    for index in by_class(labels, classes):
        white = robust_whitened(
            Centred(features, index, chunk), components=components, trim=trim, rounds=rounds, shrinkage=shrinkage
        )
        values[index] = white.square().sum(1) / max(1, white.shape[1])
    return values


@dataclass(frozen=True)
class Mahalanobis(Filter):
    """Rows that lie far from the bulk of their class, in any direction; for rare backdoors and for outliers.

    Args:
        components: principal components of a class that count, >= 1.
        trim: share of a class that is left out of its centre and covariance, in (0, 1); it should exceed the share of
            poisoned rows in a class.
        rounds: how often these are computed, >= 1.
        shrinkage: weight of the plain covariance in the robust one, in (0, 1).

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Rousseeuw and Van Driessen, "A Fast Algorithm for the Minimum Covariance Determinant Estimator", 1999.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    finds: ClassVar[frozenset[str]] = frozenset({"backdoor", "outliers"})

    components: int = 16
    trim: float = 0.35
    rounds: int = 20
    shrinkage: float = 0.05

    def __post_init__(self) -> None:
        whole("mahalanobis.components", self.components)
        whole("mahalanobis.rounds", self.rounds)
        number("mahalanobis.trim", self.trim, above=0.0, below=1.0)
        number("mahalanobis.shrinkage", self.shrinkage, above=0.0, below=1.0)

    def score(self, rows: Rows) -> Scores:
        return Scores(
            mahalanobis_distance(
                given("features", rows.features),
                rows.labels,
                rows.classes,
                components=self.components,
                trim=self.trim,
                rounds=self.rounds,
                shrinkage=self.shrinkage,
            )
        )
