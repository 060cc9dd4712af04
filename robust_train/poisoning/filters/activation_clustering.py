"""Activation clustering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.filters._check import given, number, whole
from robust_train.poisoning.filters._covariance import CHUNK, Centred, principal_directions
from robust_train.poisoning.filters.base import Filter, Rows, Scores, by_class

MOST_STEPS = 100
SAMPLE = 500  # rows of each cluster among which the silhouette is computed


def two_means(points: Tensor) -> Tensor:
    """Split points into two clusters with the smallest sum of squared distances to their centres.

    Lloyd's algorithm, started once for each axis from the two sides of 0; the best result is taken.

    Args:
        points: ``(n, k)`` with mean 0 and principal axes.

    Returns:
        bool ``(n,)``, True in one of the clusters; all False where no split was found.

    Reference:
        Lloyd, "Least squares quantization in PCM", 1982.
    """
    best, gained = torch.zeros(len(points), dtype=torch.bool), 0.0
    for axis in range(points.shape[1]):
        side = points[:, axis] > 0
        for _ in range(MOST_STEPS):
            if side.all() or not side.any():
                break
            here, there = points[side].mean(0), points[~side].mean(0)
            moved = (points - (here + there) / 2) @ (here - there) > 0
            if torch.equal(moved, side):
                break
            side = moved
        if side.all() or not side.any():
            continue
        share = float(side.double().mean())
        gain = share * (1 - share) * float((points[side].mean(0) - points[~side].mean(0)).square().sum())
        if gain > gained * (1 + 1e-6):  # the same split, found from another axis, differs by rounding
            best, gained = side, gain
    return best


def silhouette(points: Tensor, side: Tensor) -> float:
    """How clearly two clusters are apart, in [-1, 1]: the mean of ``(b - a) / max(a, b)``.

    ``a`` is a point's mean distance to its own cluster, ``b`` that to the other; 0 for a cluster of one point.

    Args:
        points: ``(n, k)``.
        side: bool ``(n,)``, True in one cluster; both must have points.

    Returns:
        The mean over all points; of clusters of more than ``SAMPLE`` points as many are used, evenly spread along the
        line through the two centres.

    Reference:
        Rousseeuw, "Silhouettes: a Graphical Aid to the Interpretation and Validation of Cluster Analysis", 1987.
    """
    clusters = points[side].double(), points[~side].double()
    line = clusters[0].mean(0) - clusters[1].mean(0)
    drawn = []
    for cluster in clusters:
        ranks = torch.linspace(0, len(cluster) - 1, min(SAMPLE, len(cluster)), dtype=torch.float64).round().long()
        drawn.append(cluster[(cluster @ line).argsort()[ranks]])
    total = 0.0
    for cluster, own, other in zip(clusters, drawn, drawn[::-1], strict=True):
        if len(own) > 1:
            a = torch.cdist(own, own).sum(1) / (len(own) - 1)
            b = torch.cdist(own, other).mean(1)
            total += len(cluster) * float(((b - a) / torch.maximum(a, b).clamp_min(1e-30)).mean())
    return total / len(points)


def cluster_scores(
    features: Tensor, labels: Tensor, classes: int, *, components: int = 10, gate: float = 0.45, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Side of the smaller of two clusters of each class.

    Args:
        features: ``(N, D)`` of any real dtype, may be memory-mapped.
        labels: int64 ``(N,)``.
        classes: how many classes there are.
        components: principal components of a class that count, >= 1.
        gate: silhouette from which on a class is taken for two groups, in (-1, 1).
        chunk: elements that are held in memory at a time.

    Returns:
        Scores, float32 ``(N,)``: position along the line from the larger cluster's centre (-1) to the smaller one's
        (1), 0 in a class that cannot be split or has fewer than three rows; and groups, int64 ``(N,)``: the class
        number in the smaller cluster of a class whose silhouette reaches the gate, else -1. Where there are such
        groups, their scores are shifted by as much as puts them above all others.

    Reference:
        Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", 2018, section 4.
    """
    values, groups = torch.zeros(len(labels)), torch.full((len(labels),), -1)
    for c, index in enumerate(by_class(labels, classes)):
        rows = Centred(features, index, chunk)
        points = rows.onto(principal_directions(rows, components)[1])
        side = two_means(points)
        if len(rows) < 3 or not side.any():
            continue
        small = _smaller(points, side)
        here, there = points[small].mean(0), points[~small].mean(0)
        line = here - there
        values[index] = (points - (here + there) / 2) @ line / (line.square().sum() / 2)
        if silhouette(points, side) >= gate:
            groups[index[small]] = c
    grouped = groups >= 0
    if grouped.any() and not grouped.all():
        values[grouped] += (values[~grouped].max() - values[grouped].min()).clamp_min(0) + 1
    return values, groups


def _smaller(points: Tensor, side: Tensor) -> Tensor:
    """The side with fewer points; of equal ones the tighter."""
    ones = int(side.sum())
    if 2 * ones != len(side):
        return side if 2 * ones < len(side) else ~side
    return side if points[side].var(0, correction=0).sum() <= points[~side].var(0, correction=0).sum() else ~side


@dataclass(frozen=True)
class ActivationClustering(Filter):
    """Classes whose features fall into two clusters, as those of a backdoor's target do; the smaller is suspected.

    A class is taken for poisoned if the silhouette of its clusters reaches ``gate``, not, as in the paper, if the
    smaller one is small: on clean data the latter fires as well. The gate's default was seen to separate clean from
    poisoned classes on one data set, and did not transfer to a smaller one; look at the report before you drop rows.
    Blind to backdoors in fewer than about one row in a hundred.

    Args:
        components: principal components of a class that count, >= 1.
        gate: silhouette from which on a class is taken for poisoned, in (-1, 1).

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", 2018, section 4.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    finds: ClassVar[frozenset[str]] = frozenset({"backdoor"})

    components: int = 10
    gate: float = 0.45

    def __post_init__(self) -> None:
        whole("activation_clustering.components", self.components)
        number("activation_clustering.gate", self.gate, above=-1.0, below=1.0)

    def score(self, rows: Rows) -> Scores:
        features = given("features", rows.features)
        values, groups = cluster_scores(features, rows.labels, rows.classes, components=self.components, gate=self.gate)
        return Scores(values, groups=groups)
