"""Groups of rows that an empty gap separates from the rest of their class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.filters._check import given, number, whole
from robust_train.poisoning.filters._covariance import CHUNK, Centred, principal_directions, robust_whitened
from robust_train.poisoning.filters._gap import LEAST, cuts, gaps, refined
from robust_train.poisoning.filters.activation_clustering import two_means
from robust_train.poisoning.filters.base import Filter, Rows, Scores, by_class

FEWEST = 24  # rows among which it makes sense to look for groups
ROWS_EACH = 6  # rows for each principal component
DEPTH = 3  # of the bisection
AXES = 10  # principal axes along which a part is bisected
FARTHEST = (0.02, 0.05, 0.1)  # shares of a class that are looked at as outliers
TRIM = 0.15  # share of a class that is left out of the covariance by which these are found
CLEAR = 2.0  # separation from which on two distributions can be told apart at all (Ashman et al.)
SAME = 0.9  # Jaccard index above which two groups are the same
WORTH = 0.02  # valley share that makes up for a separation smaller by one


def isolated_groups(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    components: int = 48,
    valley: float = 0.06,
    small: float = 0.25,
    small_valley: float = 0.2,
    most: int = 4,
    search: int = 2000,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Groups of each class that lie apart from the rest of it, and by how much.

    A class is reduced to its principal components, and searched by ``isolated_parts``. A class of more than ``search``
    rows is searched on as many of them, drawn evenly along a fixed random direction; all its rows beyond the middle of
    the gap then make up the group.

    Args:
        features: ``(N, D)`` of any real dtype, may be memory-mapped.
        labels: int64 ``(N,)``.
        classes: how many classes there are.
        components: principal components of a class that count, >= 1; fewer do where there are not ``ROWS_EACH`` rows
            for each.
        valley: rows in the gap for each row of the group, at most.
        small: share of a class up to which a group is small, in (0, 1).
        small_valley: the same as ``valley`` for small groups, which may have more stragglers, >= ``valley``.
        most: groups of a class, >= 1.
        search: rows of a class among which groups are looked for, >= ``FEWEST``.
        chunk: elements that are held in memory at a time.

    Returns:
        Scores, float32 ``(N,)``: separation of the group from the rest of the class, in standard deviations, at most
        100; 0 for rows in no group. And groups, int64 ``(N,)``, numbered from 0 over all classes, of at least five rows
        each; -1 for rows in none.

    Raises:
        ValueError: features are not finite.

    Reference:
        Ding and Li, "Adaptive Dimension Reduction Using Discriminant Analysis and K-means Clustering", 2007; Ashman et
        al., "Detecting Bimodality in Astronomical Datasets", 1994 (separation).
    """
    values, groups, found = torch.zeros(len(labels)), torch.full((len(labels),), -1), 0
    for members in by_class(labels, classes):
        if len(members) < FEWEST:
            continue
        index = _by_content(features, members, chunk)
        ranks = torch.linspace(0, len(index) - 1, min(search, len(index)), dtype=torch.float64).round().long()
        rows = Centred(features, index[ranks], chunk)
        axes = principal_directions(rows, min(components, len(rows) // ROWS_EACH))[1]
        if axes.shape[1] == 0:
            continue
        points = rows.onto(axes).double()
        sides, apart = isolated_parts(points, valley=valley, small=small, small_valley=small_valley, most=most)
        if len(sides) and len(index) > len(rows):
            directions, thresholds = cuts(points, sides)
            everyone, towards = Centred(features, index, chunk), axes @ directions.T
            shift = (everyone.mean - rows.mean).double() @ towards
            sides = (everyone.onto(towards) + shift > thresholds).T
        free = torch.ones(len(index), dtype=torch.bool)
        for side, separation in zip(sides, apart.tolist(), strict=True):
            if int((side & free).sum()) >= LEAST:
                values[index[side & free]], groups[index[side & free]] = separation, found
                free, found = free & ~side, found + 1
    return values, groups


def _by_content(features: Tensor, index: Tensor, chunk: int) -> Tensor:
    """The row numbers in an order that depends on nothing but what is in the rows: that along a random direction.

    All that follows sees the rows in this order, so that neither choices nor rounding errors depend on the given one.
    """
    width = features[:1].numel()
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = index.split(max(1, chunk // (2 * max(1, width))))
    return index[torch.cat([features[part].reshape(len(part), width).double() @ direction for part in parts]).argsort()]


def isolated_parts(
    points: Tensor, *, valley: float, small: float, small_valley: float, most: int
) -> tuple[Tensor, Tensor]:
    """Parts of some points between which and the rest hardly a point lies, seen along one direction.

    Candidates are the halves of repeated bisection and the farthest outliers; each as it is, and refined by alternating
    between a discriminant direction and a split along it; each of these also cut midway between its median and that of
    the rest. The gap of each is measured by cross-validation.

    Args:
        points: ``(n, k)``, n >= ``FEWEST``, with mean 0 and principal axes, in an order that depends on their content.
        valley: points in the gap for each point of the part, at most.
        small: share of the points up to which a part is small.
        small_valley: the same as ``valley`` for small parts.
        most: how many parts, at most.

    Returns:
        bool ``(<= most, n)``, the most isolated part first, each with at most half of all points, five or more of which
        are in none before it; and their separations, float64, > ``CLEAR``.
    """
    starts = torch.cat([bisections(points), outlying(points)])
    sides = _worth_it(torch.cat([refined(points, starts), starts]))
    directions, thresholds = cuts(points, sides)
    sides = _worth_it(torch.cat([sides, (points @ directions.T > thresholds).T]))
    apart, shares = gaps(points, sides)
    share = sides.double().mean(1)
    passed = (apart > CLEAR) & ((shares <= valley) | (shares <= small_valley) & (share <= small))
    sides, apart, shares = sides[passed], apart[passed], shares[passed]
    chosen: list[int] = []
    free = torch.ones(len(points), dtype=torch.bool)
    for i in (shares - WORTH * apart).argsort(stable=True).tolist():
        both, either = (part.sum(1) for part in (sides[chosen] & sides[i], sides[chosen] | sides[i]))
        if len(chosen) < most and int((sides[i] & free).sum()) >= LEAST and (both <= SAME * either).all():
            chosen.append(i)
            free &= ~sides[i]
    return sides[chosen], apart[chosen]


def _worth_it(sides: Tensor) -> Tensor:
    size = sides.sum(1)
    return sides[(size >= LEAST) & (2 * size <= sides.shape[1])]


def bisections(points: Tensor) -> Tensor:
    """The halves that two-means splits the points into, the halves of these, and so on, ``DEPTH`` times.

    Args:
        points: ``(n, k)``.

    Returns:
        bool ``(c, n)``, with at most ``2 ** (DEPTH + 1) - 2`` parts.
    """
    found = torch.zeros(0, len(points), dtype=torch.bool)
    parts = [torch.arange(len(points))]
    for _ in range(DEPTH):
        halves: list[Tensor] = []
        for part in parts:
            rows = Centred(points, part)
            side = two_means(rows.onto(principal_directions(rows, AXES)[1]))
            halves += [part[side], part[~side]] if side.any() else []
        found = torch.cat([found, *(_mask(half, len(points)) for half in halves)])
        parts = [half for half in halves if len(half) >= FEWEST]
    return found


def outlying(points: Tensor) -> Tensor:
    """The points that lie farthest in the directions which the outliers have in common.

    Args:
        points: ``(n, k)``.

    Returns:
        bool ``(c, n)``, with at most two parts for each of ``FARTHEST``.
    """
    rows = Centred(points, torch.arange(len(points)))
    white = robust_whitened(rows, components=points.shape[1], trim=TRIM, rounds=5, shrinkage=0.001)
    found = torch.zeros(0, len(points), dtype=torch.bool)
    distances = white.square().sum(1)
    for count in (round(share * len(points)) for share in FARTHEST):
        if count < LEAST or white.shape[1] == 0:
            continue
        far = white[distances.topk(count).indices]
        for axis in torch.linalg.svd(far, full_matrices=False).Vh[:2]:
            line = white @ axis * (far @ axis).pow(3).sum().sign()
            found = torch.cat([found, _mask(line.topk(count).indices, len(points))])
    return found


def _mask(index: Tensor, n: int) -> Tensor:
    return torch.zeros(1, n, dtype=torch.bool).index_fill(1, index, True)


@dataclass(frozen=True)
class IsolatedGroups(Filter):
    """Groups of rows that lie apart from the rest of their class, as those of a backdoor do, also of a rare one.

    A network that has learned a trigger maps the rows that carry it into a place of their own, and there is a direction
    in which hardly any row lies between them and the rest of their class. Flipped labels that go from one class to one
    other show the same. A group is a proposal and no more: classes with styles of their own (the digit 1 with and
    without a foot) have such gaps too, and no p-value says how often, because the direction was searched for. Whether a
    group is poison is to be judged by other means, best by a model that was trained without it: if that one says of
    these rows what their labels say, they are harmless. Where two groups overlap, what remains of the less isolated one
    is a group of its own, so that it can be judged by itself; such remnants are often harmless.

    Rows that a trigger does not reach in the features are not found, nor are groups of fewer than five rows or of more
    than half of a class, nor poison in classes of fewer than 24 rows. The settings were chosen on Fashion-MNIST and on
    digits.

    Args:
        components: principal components of a class that count, >= 1.
        valley: rows in the gap (the middle third of the way between the medians of the group and of the rest) for each
            row of the group, at most, in (0, 1).
        small: share of a class up to which a group is small, in (0, 1).
        small_valley: the same as ``valley`` for small groups, in (0, 1), >= ``valley``.
        most: groups of a class, >= 1.
        search: rows of a class among which groups are looked for, >= 24; more cost time, and find rarer groups.

    Raises:
        ValueError: a setting is out of range.

    Guarantees:
        No row is in two groups; each group lies within one class and has at least five rows; a class has at most
        ``most``; they are numbered 0, 1, …

    Reference:
        Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", 2018, section 4
        (groups within a class, and exclusionary reclassification to judge them); Tran et al., "Spectral Signatures in
        Backdoor Attacks", 2018; Ding and Li, "Adaptive Dimension Reduction Using Discriminant Analysis and K-means
        Clustering", 2007 (the search); Ashman et al., "Detecting Bimodality in Astronomical Datasets", 1994
        (separation).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    finds: ClassVar[frozenset[str]] = frozenset({"backdoor"})

    components: int = 48
    valley: float = 0.06
    small: float = 0.25
    small_valley: float = 0.2
    most: int = 4
    search: int = 2000

    def __post_init__(self) -> None:
        whole("isolated_groups.components", self.components)
        whole("isolated_groups.most", self.most)
        whole("isolated_groups.search", self.search, low=FEWEST)
        number("isolated_groups.valley", self.valley, above=0.0, below=1.0)
        number("isolated_groups.small", self.small, above=0.0, below=1.0)
        number("isolated_groups.small_valley", self.small_valley, above=0.0, below=1.0)
        if self.small_valley < self.valley:
            raise ValueError(
                f"isolated_groups.small_valley must be >= valley ({self.valley!r}), got {self.small_valley!r}"
            )

    def score(self, rows: Rows) -> Scores:
        values, groups = isolated_groups(
            given("features", rows.features),
            rows.labels,
            rows.classes,
            components=self.components,
            valley=self.valley,
            small=self.small,
            small_valley=self.small_valley,
            most=self.most,
            search=self.search,
        )
        return Scores(values, groups=groups)
