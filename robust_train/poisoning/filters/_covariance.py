"""Means, covariances, principal directions and robust whitening of some rows of a table, read in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**25  # elements of a float32 block: 128 MiB
PASSES = 12  # over the rows, at most, in the search for principal directions
SPARE = 3  # directions that are looked for beyond those asked for, because a block converges faster
CONVERGED = 1e-4  # residual of a direction, relative to the largest variance
NEGLIGIBLE = 1e-6  # of the largest variance; below, float32 knows only rounding errors
MAD_TO_STD = 1.4826  # of a normal distribution
ROWS_EACH = 10  # untrimmed rows that a robust covariance needs for each of its dimensions


class Centred:
    """Some rows of a table minus their mean, as float32 blocks that can be read again and again.

    Rows that fit into one block are read from the table once and kept; more are read anew in every pass.

    Args:
        table: ``(N, ...)`` of any real dtype, may be memory-mapped; dimensions behind the first are flattened.
        index: numbers of the rows that count ``(n,)``.
        chunk: elements of a block.

    Attributes:
        mean: float32 ``(D,)``.
        squares: squared distance of each row to the mean, float32 ``(n,)``.
        spread: mean of ``squares``; 0 where the rows differ by rounding errors only.

    Raises:
        ValueError: the rows hold NaN or infinity.
    """

    def __init__(self, table: Tensor, index: Tensor, chunk: int = CHUNK) -> None:
        self._table, self._index = table, index
        self.width = table[:1].numel() if len(table) else 0
        self._step = max(1, chunk // max(1, self.width))
        self._kept: Tensor | None = None
        total = torch.zeros(self.width, dtype=torch.float64)
        for block in self._raw():
            total += block.sum(0)
            self._kept = block if len(index) <= self._step else None
        self.mean = (total / max(1, len(index))).float()
        if not torch.isfinite(self.mean).all():
            raise ValueError(
                "features or inputs hold values that are not finite: remove such rows, or scale what float16 cannot "
                "hold (above 65504)"
            )
        if self._kept is not None:
            self._kept -= self.mean
        self.squares = torch.cat([torch.zeros(0), *(block.square().sum(1) for block in self)])
        spread = float(self.squares.sum(dtype=torch.float64)) / max(1, len(index))
        self.spread = spread if spread > NEGLIGIBLE**2 * float(self.mean.square().sum()) else 0.0

    def _raw(self) -> Iterator[Tensor]:
        for part in self._index.split(self._step):
            yield self._table[part].reshape(len(part), self.width).to(torch.float32, copy=True)

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Tensor]:
        if self._kept is not None:
            yield self._kept
        else:
            for block in self._raw():
                yield block.sub_(self.mean)

    def onto(self, directions: Tensor) -> Tensor:
        """Projections of the rows, float32 ``(n, k)``, onto directions ``(D, k)``."""
        directions = directions.float()
        return torch.cat([block @ directions for block in self])

    def applied(self, directions: Tensor) -> Tensor:
        """The covariance matrix times ``directions`` ``(D, k)``, float64, without forming the matrix."""
        narrow, total = directions.float(), torch.zeros(directions.shape, dtype=torch.float64)
        for block in self:
            total += ((block @ narrow).T @ block).T  # three times faster than block.T @ (…) with few columns
        return total / len(self)


def covariance(rows: Centred) -> Tensor:
    """Covariance matrix, float64 ``(D, D)``, in one pass."""
    total = torch.zeros(rows.width, rows.width, dtype=torch.float64)
    for block in rows:
        total += block.T @ block
    return total / len(rows)


def principal_directions(rows: Centred, k: int) -> tuple[Tensor, Tensor]:
    """The directions of largest variance.

    A few directions of many are found by a block Krylov iteration, which reads the rows at most ``PASSES`` times and
    needs memory for ``D * PASSES * (k + SPARE)`` numbers; otherwise the covariance matrix is decomposed. Both start
    from the same place in every call. Of directions with exactly the same variance any may come back.

    Args:
        rows: n centred rows of width D.
        k: how many, >= 0; fewer come back where the rows span fewer.

    Returns:
        Variances, float64 ``(k,)``, descending and > 0, and unit vectors, float64 ``(D, k)``.

    Reference:
        Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
        Decomposition", 2015, algorithm 2.
    """
    if rows.spread == 0.0 or k == 0:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(rows.width, 0, dtype=torch.float64)
    k = min(k, rows.width, len(rows) - 1)
    if 3 * PASSES * (k + SPARE) < rows.width:  # where it is faster, measured with 60,000 rows
        values, vectors = _krylov(rows, k)
    else:
        values, vectors = (found.flip(-1)[..., :k] for found in torch.linalg.eigh(covariance(rows).float()))
    real = values > NEGLIGIBLE * values[0]
    values, vectors = values[real].double(), vectors[:, real].double()
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * largest.sign()  # the sign that a decomposition returns may depend on rounding


def _krylov(rows: Centred, k: int) -> tuple[Tensor, Tensor]:
    start = torch.randn(rows.width, k + SPARE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    new = basis = torch.linalg.qr(start).Q
    images = torch.zeros(rows.width, 0, dtype=torch.float64)
    passes = 0
    while True:
        latest, passes = rows.applied(new), passes + 1
        images = torch.cat([images, latest], 1)
        small = basis.T @ images
        values, inner = (found.flip(-1)[..., :k] for found in torch.linalg.eigh((small + small.T) / 2))
        vectors = basis @ inner
        residual = (images @ inner - vectors * values).norm(dim=0).max()
        for _ in range(2):  # once leaves rounding errors of the first subtraction
            latest = latest - basis @ (basis.T @ latest)
        left, sizes, _ = torch.linalg.svd(latest, full_matrices=False)
        new = left[:, sizes > NEGLIGIBLE * values[0]]
        if residual <= CONVERGED * values[0] or passes == PASSES or new.shape[1] == 0:
            return values, vectors
        basis = torch.cat([basis, new], 1)


def robust_whitened(rows: Centred, *, components: int, trim: float, rounds: int, shrinkage: float) -> Tensor:
    """The rows with mean 0 and covariance 1, as judged by those of them that lie closest together.

    The rows are reduced to their principal components, each scaled to variance 1. Centre and covariance are those of
    the ``1 - trim`` share of the rows with the smallest Mahalanobis distance; those nearer than half of them count
    fully, the others less and less, so that no row's weight jumps. This is repeated, and started from each component's
    median and median absolute deviation, which a cluster of fewer than half of the rows cannot move far. At last the
    covariance, which trimming made too small, is scaled so that the median distance is that of a normal distribution.

    Args:
        rows: n centred rows.
        components: principal components that count, >= 1; fewer do where there are not ``ROWS_EACH`` untrimmed rows for
            each, because a few rows fit the covariance too well, and those left out of it look far away.
        trim: share of the rows that is left out of centre and covariance, in (0, 1).
        rounds: how often centre and covariance are computed, >= 1.
        shrinkage: weight of the plain covariance of all rows in the robust one, in (0, 1).

    Returns:
        float32 ``(n, k)``, up to a rotation; k is smaller than ``components`` where the rows are few or span fewer
        directions, and 0 where they do not differ.

    Reference:
        Rousseeuw and Van Driessen, "A Fast Algorithm for the Minimum Covariance Determinant Estimator", 1999, section
        3 (the concentration step); Hubert et al., "A Deterministic Algorithm for Robust Location and Scatter", 2012
        (robust starts in place of random ones).
    """
    kept = round((1 - trim) * len(rows))
    values, directions = principal_directions(rows, min(components, kept // ROWS_EACH))
    points = rows.onto(directions / values.sqrt())
    width = points.shape[1]
    if width == 0:
        return points
    plain = torch.eye(width, dtype=torch.float64)
    centre = points.median(0).values
    deviations = MAD_TO_STD * (points - centre).abs().median(0).values.double()
    factor = ((1 - shrinkage) * deviations.square() + shrinkage).sqrt().diag()
    for _ in range(rounds):
        distances = _whiten(points, centre, factor).square().sum(1)
        inner, outer = distances.kthvalue((kept + 1) // 2).values, distances.kthvalue(kept).values
        weights = ((outer - distances) / (outer - inner)).clamp(0, 1).where(distances > inner, 1.0)
        centre = (weights @ points) / weights.sum()
        apart = points - centre
        robust = (apart.T @ (apart * weights[:, None])).double() / weights.sum()
        factor = torch.linalg.cholesky((1 - shrinkage) * robust + shrinkage * plain)
    white = _whiten(points, centre, factor)
    usual = width * (1 - 2 / (9 * width)) ** 3  # median of chi-squared (Wilson and Hilferty)
    return white / (white.square().sum(1).median() / usual).clamp_min(1.0).sqrt()


def _whiten(points: Tensor, centre: Tensor, factor: Tensor) -> Tensor:
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
    return (points - centre) @ inverse.T.float()
