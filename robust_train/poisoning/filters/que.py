"""Quantum entropy scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.filters._check import given, number, whole
from robust_train.poisoning.filters._covariance import CHUNK, Centred, robust_whitened
from robust_train.poisoning.filters.base import Filter, Rows, Scores, by_class


def quantum_entropy(white: Tensor, *, alpha: float = 4.0) -> Tensor:
    """``h' Q h / tr(Q)`` with ``Q = exp(alpha (S - 1) / (|S| - 1))``, S the second moment of all rows h.

    Directions in which the rows vary more than the robust covariance says count more: all alike for alpha = 0, only
    the largest for alpha -> infinity. Where ``|S| - 1`` is no more than n rows of white noise would have (the edge of
    Marchenko and Pastur), it is replaced by that, so that chance is not blown up to a direction.

    Args:
        white: rows whitened with a robust centre and covariance ``(n, k)``.
        alpha: how much large directions count, > 0.

    Returns:
        ``(n,)``, >= 0; 0 where k is 0.

    Reference:
        Hayase et al., "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics", 2021, section 3.
    """
    if white.numel() == 0:
        return white.new_zeros(len(white))
    values, vectors = torch.linalg.eigh((white.T @ white).double() / len(white))
    chance = (1 + math.sqrt(white.shape[1] / len(white))) ** 2 - 1
    weights = (alpha * (values - 1) / (values[-1] - 1).clamp_min(chance)).softmax(0)
    return (white @ (vectors * weights.sqrt()).to(white.dtype)).square().sum(1)


def que_scores(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    components: int = 16,
    alpha: float = 4.0,
    trim: float = 0.35,
    rounds: int = 20,
    shrinkage: float = 0.05,
    chunk: int = CHUNK,
) -> Tensor:
    """Quantum entropy score of each row within its class, after robust whitening.

    Args:
        features: ``(N, D)`` of any real dtype, may be memory-mapped.
        labels: int64 ``(N,)``.
        classes: how many classes there are.
        components: principal components of a class that count, >= 1.
        alpha: how much large directions count, > 0.
        trim: share of a class that is left out of centre and covariance, in (0, 1).
        rounds: how often these are computed, >= 1.
        shrinkage: weight of the plain covariance in the robust one, in (0, 1).
        chunk: elements that are held in memory at a time.

    Returns:
        float32 ``(N,)``, >= 0; 0 in a class whose rows do not differ, or are
        fewer than about sixteen.

    Reference:
        Hayase et al., "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics", 2021, algorithms 1 and 3.
    """
    values = torch.zeros(len(labels))
    for index in by_class(labels, classes):
        white = robust_whitened(
            Centred(features, index, chunk), components=components, trim=trim, rounds=rounds, shrinkage=shrinkage
        )
        values[index] = quantum_entropy(white, alpha=alpha)
    return values


@dataclass(frozen=True)
class QUE(Filter):
    """Rows in the directions in which a class varies more than its bulk does; for backdoors, also rare ones.

    As in SPECTRE, but the robust covariance is a trimmed one, and the number of components is fixed.

    Args:
        components: principal components of a class that count, >= 1.
        alpha: how much large directions count, > 0.
        trim: share of a class that is left out of its centre and covariance, in (0, 1); it should exceed the share of
            poisoned rows in a class.
        rounds: how often these are computed, >= 1.
        shrinkage: weight of the plain covariance in the robust one, in (0, 1).

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Hayase et al., "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics", 2021, section 3.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    finds: ClassVar[frozenset[str]] = frozenset({"backdoor"})

    components: int = 16
    alpha: float = 4.0
    trim: float = 0.35
    rounds: int = 20
    shrinkage: float = 0.05

    def __post_init__(self) -> None:
        whole("que.components", self.components)
        whole("que.rounds", self.rounds)
        number("que.alpha", self.alpha, above=0.0)
        number("que.trim", self.trim, above=0.0, below=1.0)
        number("que.shrinkage", self.shrinkage, above=0.0, below=1.0)

    def score(self, rows: Rows) -> Scores:
        return Scores(
            que_scores(
                given("features", rows.features),
                rows.labels,
                rows.classes,
                components=self.components,
                alpha=self.alpha,
                trim=self.trim,
                rounds=self.rounds,
                shrinkage=self.shrinkage,
            )
        )
