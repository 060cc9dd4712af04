"""What draws the rows of a train loader, for a part of the rows.

Whatever a user's sampler yields are rows of the user's dataset. What is made of it here yields *positions* in the view
of the dataset that has only the kept rows (``_loaders.KeptRows``), so that no row that was dropped can be reached.
Lengths are exact: where a loader claims more batches than it delivers, Lightning neither validates at the end of an
epoch nor takes the last optimizer step.
"""

from __future__ import annotations

import copy
import heapq
import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from robust_train.callbacks import _seams
from robust_train.evasion.randomness import preserved_rng

DROPPED = -1  # in place of a position


def kept_stream(stream: Any, keep: np.ndarray, view: Any) -> Any:
    """What draws positions in ``view`` as ``stream`` draws rows of the whole dataset.

    Args:
        stream: a sampler or batch sampler, or any iterable of row numbers or of batches of them; it is not changed.
        keep: which rows are kept, bool ``(N,)``.
        view: the dataset's view of the kept rows, of which torch's samplers read the length.

    Returns:
        A sampler of the same type for those of torch; otherwise a ``KeptSampler`` or ``KeptBatches``, which draws from
        ``stream`` itself.

    Raises:
        ValueError: it yields no row numbers, or none that is kept.
    """
    size, share = len(keep), len(view) / len(keep)
    kind = type(stream)
    if kind is BatchSampler:
        return BatchSampler(kept_stream(stream.sampler, keep, view), stream.batch_size, stream.drop_last)
    if kind is SequentialSampler and len(stream.data_source) == size:
        return SequentialSampler(view)
    if kind is RandomSampler and len(stream.data_source) == size:
        draws = None if stream.num_samples == size else max(1, round(stream.num_samples * share))
        return RandomSampler(view, stream.replacement, draws, stream.generator)
    if kind is DistributedSampler and len(stream.dataset) == size:
        return _same_shard(stream, view)
    if kind is WeightedRandomSampler and len(stream.weights) == size:
        weights = stream.weights[torch.from_numpy(keep)]
        if not bool((weights > 0).any()):
            raise ValueError("the train loader's WeightedRandomSampler gives weight 0 to every row that is kept")
        if stream.replacement:  # of each row as many draws as before are expected
            draws = round(stream.num_samples * float(weights.sum() / stream.weights.sum()))
        else:
            draws = min(round(stream.num_samples * share), int((weights > 0).sum()))
        return WeightedRandomSampler(weights.tolist(), max(1, draws), stream.replacement, stream.generator)
    positions = np.where(keep, np.cumsum(keep) - 1, DROPPED)
    if kind is SubsetRandomSampler:
        found = positions[row_numbers(list(stream.indices), size)]
        if not (found != DROPPED).any():
            raise ValueError("every row that the train loader's SubsetRandomSampler draws was dropped")
        return SubsetRandomSampler(found[found != DROPPED].tolist(), stream.generator)
    return _wrapped(stream, positions, view)


def a_pass_of_batches(stream: Any, dataset: Any) -> list[Any] | None:
    """A pass of what ``stream`` yields, if those are batches; None if they are single rows."""
    first, _ = _two_passes(stream, dataset)
    return first if first and is_batch(first[0]) else None


def is_batch(element: Any) -> bool:
    """Whether a sampler's element is several row numbers."""
    return isinstance(element, (list, tuple)) or (isinstance(element, (np.ndarray, torch.Tensor)) and element.ndim > 0)


def row_numbers(elements: Iterable[Any], size: int) -> np.ndarray:
    """Row numbers that a sampler yielded, int64 in ``[0, size)``.

    Raises:
        ValueError: one is none.
    """
    return np.array([_row_number(element, size) for element in elements], dtype=np.int64)


def _row_number(element: Any, size: int) -> int:
    try:
        row = operator.index(element)
    except TypeError:
        row = size
    if isinstance(element, bool) or not -size <= row < size:
        raise ValueError(
            f"the train loader's sampler yields {element!r}, which is no row number below {size}: the rows of a "
            "dataset can be told apart only where they are numbered 0 … N - 1. Let dataset and sampler work with "
            "whole numbers"
        )
    return row % size


def spread(batches: Sequence[Sequence[Any]], count: int) -> list[Sequence[Any]]:
    """Exactly ``count`` batches, where there are at most as many: the largest are split.

    Args:
        batches: none of them empty.
        count: at least ``len(batches)``.

    Guarantees:
        The elements stay in their order; no batch has elements of two. Each element is there once if there are at
        least ``count`` of them; otherwise batches are repeated from the first on.
    """
    parts = [1] * len(batches)
    heap = [(-float(len(batch)), i) for i, batch in enumerate(batches) if len(batch) > 1]
    heapq.heapify(heap)
    for _ in range(count - len(batches)):
        if not heap:
            break
        _, i = heapq.heappop(heap)
        parts[i] += 1
        if parts[i] < len(batches[i]):
            heapq.heappush(heap, (-len(batches[i]) / parts[i], i))
    split = [
        batch[len(batch) * k // n : len(batch) * (k + 1) // n]
        for batch, n in zip(batches, parts, strict=True)
        for k in range(n)
    ]
    return [split[k % len(split)] for k in range(max(count, len(split)))]


class _Drawing:
    """Reads like the user's sampler: what it does not have itself, ``set_epoch`` for example, is that one's."""

    base: Any

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("__"):  # the latter are also Lightning's notes on the user's sampler
            raise AttributeError(name)
        return getattr(self.base, name)


class KeptSampler(_Drawing, Sampler[int]):
    """What a user's sampler yields, without the rows that were dropped; begun again until ``length`` were drawn.

    Args:
        base: the user's sampler.
        positions: of each row in the view of the kept ones, ``DROPPED`` for the others, int64 ``(N,)``.
        length: of a pass; None for one pass of ``base``, whose length is unknown.
    """

    def __init__(self, base: Any, positions: np.ndarray, length: int | None) -> None:
        self.base, self.positions, self.length = base, positions, length

    def __iter__(self) -> Iterator[int]:
        drawn = 0
        while True:
            before = drawn
            for element in self.base:
                position = int(self.positions[_row_number(element, len(self.positions))])
                if position == DROPPED:
                    continue
                if drawn == self.length:
                    return
                yield position
                drawn += 1
            if self.length is None or drawn == self.length:
                return
            if drawn == before:
                raise RuntimeError(f"every row that the train loader's {type(self.base).__name__} draws was dropped")

    def __len__(self) -> int:
        return _length(self)


class KeptShard(KeptSampler, DistributedSampler):
    """Of a sampler that draws one process's share itself, which Lightning must not share out again."""

    def set_epoch(self, epoch: int) -> None:
        self.base.set_epoch(epoch)


class KeptBatches(_Drawing, Sampler[Any]):
    """A user's batches without the rows that were dropped. Rows of two batches are never mixed.

    A batch of which nothing is left is left out where the sampler makes the same batches in every pass. Where it makes
    others each time, as many batches as before are delivered, so that the length is known: instead of one that is
    empty, a large one is split.

    Args:
        base: the user's batch sampler.
        positions: of each row in the view of the kept ones, ``DROPPED`` for the others, int64 ``(N,)``.
        length: number of batches; None for one pass of ``base``, whose length is unknown.
        sampler: a process's share of the positions. Lightning passes it when it makes batch samplers anew for several
            processes; the user's is then made anew, to draw from those rows.
    """

    def __init__(self, base: Any, positions: np.ndarray, length: int | None, sampler: Any = None) -> None:
        if sampler is not None:
            base = _seams.batch_sampler_on(base, Rows(sampler, np.flatnonzero(positions != DROPPED)))
            length = _sized(base)
        self.base, self.positions, self.length = base, positions, length
        _seams.remember_arguments(self, base=base, positions=positions, length=length)

    def __iter__(self) -> Iterator[Any]:
        kept = filter(len, map(self._without_dropped, islice(iter(self.base), _sized(self.base))))
        if self.length is None:
            yield from kept
            return
        batches = list(kept)
        if not batches:
            raise RuntimeError(f"every row that the train loader's {type(self.base).__name__} draws was dropped")
        yield from spread(batches, self.length)

    def __len__(self) -> int:
        return _length(self)

    def _without_dropped(self, batch: Any) -> Any:
        found = self.positions[row_numbers(batch, len(self.positions))]
        found = found[found != DROPPED]
        if isinstance(batch, torch.Tensor):
            return torch.from_numpy(found).to(batch.dtype)
        return found if isinstance(batch, np.ndarray) else found.tolist()


class Rows(_Drawing):
    """Row numbers of the whole dataset, where ``base`` draws positions among the kept ones."""

    def __init__(self, base: Any, rows: np.ndarray) -> None:
        self.base, self.rows = base, rows

    def __iter__(self) -> Iterator[int]:
        return (int(self.rows[position]) for position in self.base)

    def __len__(self) -> int:
        return len(self.base)


def _wrapped(stream: Any, positions: np.ndarray, view: Any) -> KeptSampler | KeptBatches:
    """A sampler that is not known, around which the dropped rows are left out."""
    size, length = len(positions), _sized(stream)
    first, second = _two_passes(stream, view.dataset)
    if not first:
        raise ValueError(f"the train loader's sampler {type(stream).__name__} yields nothing")
    batched = is_batch(first[0])
    sets, others = _sets_of_rows(first, batched, size), _sets_of_rows(second, batched, size)
    if length is not None:
        left = [int((positions[rows] != DROPPED).sum()) for rows in sets]
        if not any(left):
            raise ValueError(f"every row that the train loader's sampler {type(stream).__name__} draws was dropped")
        covers = len(np.unique(np.concatenate(sets))) == size
        same = len(sets) == len(others) and all(map(np.array_equal, sets, others))
        if same and (covers or not _several_processes(stream)):
            length = sum(map(bool, left)) if batched else sum(left)
        elif not same and not batched and not _several_processes(stream):
            length = max(1, round(length * len(view) / size))
        # else: as many as without the filter; processes that draw rows of their own stay in step
    if batched:
        return KeptBatches(stream, positions, length)
    return (KeptShard if isinstance(stream, DistributedSampler) else KeptSampler)(stream, positions, length)


def _sets_of_rows(elements: list[Any], batched: bool, size: int) -> list[np.ndarray]:
    """Which rows a pass yields together: those of each batch, in an order of no meaning; or all, where it has none."""
    if not batched:
        return [np.sort(row_numbers(elements, size))]
    return sorted((np.sort(row_numbers(batch, size)) for batch in elements), key=np.ndarray.tobytes)


def _two_passes(stream: Any, dataset: Any) -> tuple[list[Any], list[Any]]:
    """What it yields in two passes, of different epochs; where it has no length, its first element alone.

    A copy is asked, so that the sampler's own generator is not moved; the dataset is not copied with it.
    """
    length = _sized(stream)
    with preserved_rng(torch.device("cpu")):
        try:
            twin = copy.deepcopy(stream, {id(d): d for d in _datasets(stream, dataset)})
        except Exception:  # it holds what cannot be copied, an open file for example
            twin = stream
        passes = []
        for epoch in range(2):
            if twin is not stream:
                for sampler in (twin, getattr(twin, "sampler", None)):
                    if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                        set_epoch(epoch)
            passes.append(list(islice(iter(twin), 1 if length is None else length)))
    return passes[0], passes[1]


def _datasets(stream: Any, dataset: Any) -> Iterator[Any]:
    """The loader's dataset, those that it is made of, and those that the sampler holds."""
    found = [dataset]
    for holder in (stream, getattr(stream, "sampler", None)):
        found += [value for value in getattr(holder, "__dict__", {}).values() if isinstance(value, Dataset)]
    for one in found:
        yield one
        if isinstance(one, (Subset, ConcatDataset, StackDataset)):
            inner = one.dataset if isinstance(one, Subset) else one.datasets
            found += (
                inner.values() if isinstance(inner, dict) else inner if isinstance(inner, (list, tuple)) else [inner]
            )


def _same_shard(sampler: DistributedSampler[Any], view: Any) -> DistributedSampler[Any]:
    shard = DistributedSampler(
        view, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
    )
    shard.set_epoch(sampler.epoch)
    return shard


def _several_processes(stream: Any) -> bool:
    """Whether processes may draw different rows, and must agree on how many all the same."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return isinstance(stream, DistributedSampler) or (running and torch.distributed.get_world_size() > 1)


def _sized(stream: Any) -> int | None:
    try:
        return len(stream)
    except (TypeError, NotImplementedError):
        return None


def _length(stream: KeptSampler | KeptBatches) -> int:
    if stream.length is None:
        raise TypeError(f"the train loader's sampler {type(stream.base).__name__} has no length")
    return stream.length
