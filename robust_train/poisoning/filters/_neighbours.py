"""Exact nearest neighbours of distinct inputs, and the labels that their copies bear."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.poisoning.filters._covariance import CHUNK, Centred, principal_directions

QUERIES, BASE = 512, 2**16  # points that are compared at a time: 128 MiB of distances


def contents(inputs: Tensor) -> Tensor:
    """A number for each row that rows share if they are equal to the bit.

    Args:
        inputs: ``(N, ...)`` of any dtype, may be memory-mapped.

    Returns:
        int64 ``(N,)``, 0 to M - 1, in an order that depends on the contents only, not on that of the rows.
    """
    found: list[bytes] = []
    for block in inputs.split(max(1, CHUNK // max(1, inputs[:1].numel()))):
        rows = (
            block.detach()
            .cpu()
            .clone(memory_format=torch.contiguous_format)
            .reshape(len(block), -1)
            .view(torch.uint8)
            .numpy()
        )
        found += [hashlib.sha256(row).digest() for row in rows]
    numbers = {digest: number for number, digest in enumerate(sorted(set(found)))}
    return torch.tensor([numbers[digest] for digest in found], dtype=torch.long)


class Copies:
    """How often each content occurs with each label.

    Args:
        content: number of each row's content ``(N,)``, 0 to M - 1.
        labels: int64 ``(N,)``, >= 0.

    Attributes:
        sizes: rows with each content ``(M,)``.
    """

    def __init__(self, content: Tensor, labels: Tensor) -> None:
        self.sizes = torch.bincount(content)
        self._classes = int(labels.max()) + 1 if len(labels) else 1
        self._pairs, self._counts = torch.unique(content * self._classes + labels, return_counts=True)

    def with_label(self, content: Tensor, labels: Tensor) -> Tensor:
        """Rows that have this content and this label; both arguments int64 of the same shape."""
        pairs = content * self._classes + labels
        place = torch.searchsorted(self._pairs, pairs).clamp_max(len(self._pairs) - 1)
        return self._counts[place].where(self._pairs[place] == pairs, 0)


@dataclass(frozen=True)
class Neighbours:
    """What lies around each of N rows, nearest first.

    The first column stands for the row's own copies, at distance 0; each further one for a content and all its copies.

    Attributes:
        distances: float32 ``(N, k + 1)``.
        sizes: rows at each place ``(N, k + 1)``, the row itself not among them.
        others: those of them that bear another label than the row ``(N, k + 1)``.
    """

    distances: Tensor
    sizes: Tensor
    others: Tensor


def neighbours(inputs: Tensor, labels: Tensor, *, components: int, k: int) -> Neighbours:
    """The contents nearest to each row, by Euclidean distance between principal components of the inputs.

    Args:
        inputs: ``(N, ...)`` of any real dtype, may be memory-mapped.
        labels: int64 ``(N,)``.
        components: principal components that count, >= 1.
        k: how many contents; fewer come back where there are fewer.

    Guarantees:
        Another order of the rows changes nothing, also where many contents are equally far.
    """
    content = contents(inputs)
    copies = Copies(content, labels)
    first = torch.full((len(copies.sizes),), len(inputs)).scatter_reduce(0, content, torch.arange(len(inputs)), "amin")
    rows = Centred(inputs, first)
    distances, near = nearest(rows.onto(principal_directions(rows, components)[1]), k)
    around = torch.cat([content[:, None], near[content]], 1)
    sizes, same = copies.sizes[around], copies.with_label(around, labels[:, None].expand_as(around))
    sizes[:, 0] -= 1
    same[:, 0] -= 1
    return Neighbours(torch.cat([torch.zeros(len(inputs), 1), distances[content]], 1), sizes, sizes - same)


def nearest(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k points nearest to each of M points, itself left out, by an exact search; with faiss where it is installed.

    Args:
        points: float32 ``(M, K)``.
        k: how many; M - 1 where there are fewer.

    Returns:
        Distances, float32 ``(M, k)``, ascending, and numbers, int64 ``(M, k)``.
    """
    k = min(k, len(points) - 1)
    if k < 1:
        return torch.zeros(len(points), 0), torch.zeros(len(points), 0, dtype=torch.long)
    with_faiss = importlib.util.find_spec("faiss") is not None and points.shape[1] > 0
    found = _search_faiss(points, k) if with_faiss else _search(points, k)
    distances = torch.cat(
        [  # again without |x|^2 - 2xy + |y|^2, which is inexact for close points
            (points[queries, None] - points[near]).norm(dim=2)
            for queries, near in zip(torch.arange(len(points)).split(QUERIES), found.split(QUERIES), strict=True)
        ]
    )
    distances, order = distances.sort(dim=1, stable=True)
    return distances, found.gather(1, order)


def _search(points: Tensor, k: int) -> Tensor:
    squares, numbers = points.square().sum(1), torch.arange(len(points))
    found = []
    for queries in numbers.split(QUERIES):
        best, which = torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.long)
        for base in numbers.split(BASE):
            apart = torch.addmm(squares[base], points[queries], points[base].T, alpha=-2)
            apart.masked_fill_(queries[:, None] == base, torch.inf)
            close, place = apart.topk(min(k, len(base)), largest=False)
            best, which = torch.cat([best, close], 1), torch.cat([which, base[place]], 1)
            best, place = best.topk(min(k, best.shape[1]), largest=False)
            which = which.gather(1, place)
        found.append(which)
    return torch.cat(found)


def _search_faiss(points: Tensor, k: int) -> Tensor:
    faiss = importlib.import_module("faiss")
    table = points.contiguous().numpy()
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(table)
    found = torch.from_numpy(index.search(table, k + 1)[1])
    wanted = found != torch.arange(len(points))[:, None]
    wanted[wanted.all(1), -1] = False  # the row itself is missing where many others are as close
    return found[wanted].reshape(len(points), k)
