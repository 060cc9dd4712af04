"""The user's train loader with a part of its rows, or with another dataset.

No loader, sampler or dataset of the user's is changed: a copy of the loader, of the same class and with the same
attributes, gets what differs. The dataset is replaced by a view of the kept rows, whatever the sampler, so that nobody
who reads the loader's ``dataset`` (``DistributedSampler``, ``overfit_batches``, Poisson sampling) meets a dropped one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    IterDataPipe,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
    get_worker_info,
)

from robust_train.callbacks import _seams
from robust_train.callbacks._samplers import a_pass_of_batches, kept_stream
from robust_train.evasion.randomness import preserved_rng

Path = tuple[str | int, ...]


def filtered(loader: Any, keep: np.ndarray, weights: np.ndarray | None = None) -> DataLoader[Any]:
    """The same loader without the rows that are not kept.

    Args:
        loader: the user's, of a map-style dataset with N rows.
        keep: bool ``(N,)``.
        weights: how often each kept row is drawn in relation to the others, ``(N,)``, > 0 where kept. An epoch is then
            as many draws, with replacement, as there are kept rows.

    Returns:
        ``loader`` itself if every row is kept and there are no weights, otherwise a copy.

    Raises:
        ValueError: nothing can be filtered out of such a loader, or no row is kept; the message says what to change.

    Guarantees:
        No row that is not kept is delivered, also where Lightning makes the loader anew for several processes or for
        ``overfit_batches``; a class that cannot be made anew without them is refused then. There are exactly as many
        batches as ``len`` says. A kept row is delivered once an epoch if ``loader`` does so, with two exceptions in
        which some are repeated: a custom batch sampler that makes other batches in every pass, when fewer rows are kept
        than it makes batches; and in several processes a custom sampler of a part of the rows, so that all have as
        many batches.
    """
    loader = check_loader(loader)
    size = len(loader.dataset)  # type: ignore[arg-type]
    if keep.dtype != bool or keep.shape != (size,):
        raise ValueError(
            f"keep must be bool of shape ({size},), one a row of the dataset, got {keep.dtype} {keep.shape}"
        )
    if not keep.any():
        raise ValueError("DataFilter: no row of the training dataset is kept")
    if weights is None and keep.all():
        return loader
    _check_reads_dataset(loader)
    view = KeptRows(loader.dataset, np.flatnonzero(keep))
    if weights is not None:
        return _weighted(loader, view, weights)
    made: dict[str, Any] = {"sampler": kept_stream(loader.sampler, keep, view)}
    if loader.batch_sampler is not None:
        made["batch_sampler"] = (
            BatchSampler(made["sampler"], loader.batch_sampler.batch_size, loader.batch_sampler.drop_last)
            if type(loader.batch_sampler) is BatchSampler and loader.batch_sampler.sampler is loader.sampler
            else kept_stream(loader.batch_sampler, keep, view)
        )
    new = copied(loader, dataset=view, **made)
    if isinstance(stream := new.batch_sampler, BatchSampler) and stream.drop_last and not len(stream):
        raise ValueError(
            f"DataFilter: only {len(view)} of {size} rows are kept, fewer than make up a batch of {stream.batch_size}, "
            "and the train loader has drop_last=True: make batches smaller"
        )
    return new


def filtered_iterable(loader: Any, predicate: Callable[[Any], bool]) -> DataLoader[Any]:
    """The same loader of an iterable dataset without the examples for which ``predicate`` is false.

    It has no length, even if ``loader`` has one: nobody knows how many examples will be dropped.

    Args:
        loader: the user's.
        predicate: told one example as the dataset yields it, says whether to keep it; worker processes call it.

    Raises:
        ValueError: the loader's dataset is not iterable-style, or is a DataPipe.
    """
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IterableDataset):
        what = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
        raise ValueError(
            f"DataFilter: a predicate filters a DataLoader of an iterable dataset, and the train loader has {what}"
        )
    if isinstance(loader.dataset, IterDataPipe):
        raise ValueError(
            "DataFilter: DataPipes are shared out by torch itself: filter with datapipe.filter(predicate) instead"
        )
    _refuse_iterators(loader)
    return copied(loader, dataset=KeptExamples(loader.dataset, predicate))


def rebuilt(loader: Any, dataset: Any, *, shuffle: bool | None = None) -> DataLoader[Any]:
    """The same loader for another dataset.

    Args:
        loader: the user's.
        dataset: map-style.
        shuffle: None: drawn as ``loader`` does. True: in random order. False: in order of the rows, all of them, also
            where ``loader`` leaves out the last ones (``drop_last``). Batches are as large as ``loader``'s.

    Raises:
        ValueError: ``loader`` is no DataLoader of a map-style dataset, or its sampler was made for another
            number of rows.
    """
    loader = check_loader(loader)
    if shuffle is None and is_plain(loader):
        return _drawing(loader, dataset, type(loader.sampler) is RandomSampler, loader.batch_size, loader.drop_last)
    old, new = len(loader.dataset), len(dataset)  # type: ignore[arg-type]
    if shuffle is None:
        if old != new:
            raise ValueError(
                f"the train loader's sampler was made for {old} rows, and there are {new}: say shuffle=True or False"
            )
        return copied(loader, dataset=dataset)
    if type(loader.batch_sampler) is BatchSampler:
        size: int | None = loader.batch_sampler.batch_size
    else:
        batches = a_pass_of_batches(loader.batch_sampler or loader.sampler, loader.dataset)
        size = max(map(len, batches)) if batches else None
    return _drawing(loader, dataset, shuffle, size, False)


def map_loaders(function: Callable[[Any, Path], Any], loaders: Any, path: Path = ()) -> Any:
    """``function(loader, path)`` in place of each loader, the structure around them unchanged.

    Args:
        function: is told a loader, or whatever else is not one of the structures, and where it lies.
        loaders: what ``train_dataloader()`` returned: a loader, a ``CombinedLoader``, or lists, tuples and dicts of
            such.
        path: where ``loaders`` itself lies.
    """
    if (flat := _seams.leaves_of(loaders)) is not None:
        inner: list[Any] = []
        map_loaders(lambda loader, at: inner.append(function(loader, at)), loaders.iterables, path)
        if len(inner) != len(flat):
            raise ValueError("the CombinedLoader holds something that is no loader, list, tuple or dict")
        loaders = copy.copy(loaders)
        loaders.flattened = inner
        return loaders
    if isinstance(loaders, dict):
        mapped = copy.copy(loaders)  # also a defaultdict, with its factory
        mapped.update({key: map_loaders(function, value, (*path, key)) for key, value in loaders.items()})
        return mapped
    if isinstance(loaders, (list, tuple)):
        items = [map_loaders(function, value, (*path, i)) for i, value in enumerate(loaders)]
        return type(loaders)(*items) if hasattr(loaders, "_fields") else type(loaders)(items)
    return function(loaders, path)


def as_list(loaders: Any) -> list[tuple[Path, Any]]:
    """Every loader in what ``train_dataloader()`` returned, with where it lies."""
    found: list[tuple[Path, Any]] = []
    map_loaders(lambda loader, path: found.append((path, loader)), loaders)
    return found


def is_plain(loader: DataLoader[Any]) -> bool:
    """Whether it draws each row once, in order or in random order."""
    sampler, size = loader.sampler, len(loader.dataset)  # type: ignore[arg-type]
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_sampler.sampler is not sampler:
        return False
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source) == size
    return type(sampler) is SequentialSampler and len(sampler.data_source) == size


def check_loader(loader: Any) -> DataLoader[Any]:
    """The user's train loader, if its rows can be told apart by number.

    Raises:
        ValueError: they cannot; the message says why, and what to change.
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(f"rows can be filtered out of a torch DataLoader, got {type(loader).__name__}: return one")
    dataset, name = loader.dataset, type(loader.dataset).__name__
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is an iterable dataset: give DataFilter a predicate= that looks at one example, or use a "
            "map-style dataset"
        )
    try:
        len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        raise ValueError(f"the training dataset {name} has no length: define __len__") from None
    _refuse_iterators(loader)
    return loader


def copied(loader: DataLoader[Any], **attributes: Any) -> DataLoader[Any]:
    """A copy with other attributes; workers and their iterators are not shared."""
    new = object.__new__(type(loader))
    new.__dict__.update(loader.__dict__)
    if "dataset" in attributes:
        _seams.remember_dataset(new, attributes["dataset"])
    # past DataLoader.__setattr__, which forbids this to whom it was not made for
    new.__dict__.update(attributes, _iterator=None)
    return new


def original_rows(dataset: Any, rows: np.ndarray) -> np.ndarray:
    """Row numbers in the dataset of which ``dataset`` is a view of kept rows, or of several."""
    while isinstance(dataset, KeptRows):
        dataset, rows = dataset.dataset, dataset.indices[rows]
    return rows


class _View:
    """Reads and writes of attributes reach the dataset behind it: a step may ask for its classes, a worker seed it."""

    dataset: Any

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # while being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)


class KeptRows(_View, Subset[Any]):
    """A view of some rows of a map-style dataset.

    Args:
        dataset: the user's.
        rows: their numbers, int64 ``(K,)``.
    """

    indices: Any  # an array; torch says sequence

    def __init__(self, dataset: Any, rows: np.ndarray) -> None:
        self.__dict__.update(dataset=dataset, indices=rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, torch.Tensor):
            found = torch.from_numpy(self.indices)[index]
            return self.dataset[found if found.ndim else int(found)]
        found = self.indices[index]
        if isinstance(index, np.ndarray):
            return self.dataset[found]
        return self.dataset[found.tolist()]  # as the user's dataset is used to, int or list of int

    def __getitems__(self, indices: Any) -> Any:
        rows = self.indices[np.asarray(indices)].tolist()
        if callable(getattr(self.dataset, "__getitems__", None)):
            return self.dataset.__getitems__(rows)
        return [self.dataset[row] for row in rows]


class KeptExamples(_View, IterableDataset[Any]):
    """An iterable dataset without the examples for which ``predicate`` is false."""

    def __init__(self, dataset: Any, predicate: Callable[[Any], bool]) -> None:
        self.__dict__.update(dataset=dataset, predicate=predicate)

    def __iter__(self) -> Iterator[Any]:
        return self._kept(iter(self.dataset))

    def _kept(self, examples: Iterator[Any]) -> Iterator[Any]:
        told = kept = 0
        for example in examples:
            told += 1
            if self.predicate(example):
                kept += 1
                yield example
        if kept or not told:
            return
        text = (
            f"DataFilter's predicate {getattr(self.predicate, '__name__', self.predicate)} dropped every one of the "
            f"{told} examples of {type(self.dataset).__name__}"
        )
        worker = get_worker_info()
        if worker is None or worker.num_workers == 1:
            raise ValueError(f"{text}: there is nothing to train on")
        warnings.warn(f"{text} that worker {worker.id} reads", stacklevel=2)  # others may keep some


class _Spy(KeptRows):
    """All rows; notes that it was asked for one."""

    def __getitem__(self, index: Any) -> Any:
        self.__dict__["asked"] = True
        return super().__getitem__(index)

    def __getitems__(self, indices: Any) -> Any:
        self.__dict__["asked"] = True
        return super().__getitems__(indices)


def _check_reads_dataset(loader: DataLoader[Any]) -> None:
    """Refuse a class that overrides ``__iter__`` to read rows from elsewhere, where the dropped ones still are.

    Its first batch is drawn, from a copy.
    """
    if type(loader).__iter__ is DataLoader.__iter__:
        return
    spy = _Spy(loader.dataset, np.arange(len(loader.dataset)))  # type: ignore[arg-type]
    alone = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "timeout": 0, "generator": None}
    alone["_DataLoader__multiprocessing_context"] = None
    streams: dict[str, Any] = {"sampler": SequentialSampler(spy)}
    if loader.batch_sampler is not None:
        streams["batch_sampler"] = BatchSampler(streams["sampler"], loader.batch_size or 1, False)
    with preserved_rng(torch.device("cpu")):
        next(iter(copied(loader, dataset=spy, **streams, **alone)), None)
    if not spy.__dict__.get("asked"):
        raise ValueError(
            f"DataFilter: {type(loader).__name__} overrides DataLoader.__iter__ and does not read its rows from "
            "self.dataset, so none can be filtered out: use a plain DataLoader, and do the work in collate_fn"
        )


def _refuse_iterators(loader: DataLoader[Any]) -> None:
    for name, value in vars(loader).items():
        if name != "_iterator" and isinstance(value, Iterator):
            raise ValueError(
                f"{type(loader).__name__} keeps an iterator of its own (its attribute {name!r}), which goes on "
                "delivering what was filtered out: use a plain DataLoader with persistent_workers=True"
            )


def _weighted(loader: DataLoader[Any], view: KeptRows, weights: np.ndarray) -> DataLoader[Any]:
    if not is_plain(loader):
        raise ValueError(
            "DataFilter: rows can be weighted only where the train loader draws each of them once (shuffle=True or "
            f"False); this one has {type(loader.sampler).__name__} and {type(loader.batch_sampler).__name__}. Drop "
            "rows instead, or let your own sampler weight them"
        )
    kept = weights[view.indices] if weights.shape == (len(loader.dataset),) else np.empty(0)  # type: ignore[arg-type]
    if not kept.size or not (np.isfinite(kept) & (kept > 0)).all():
        raise ValueError(
            f"weights must be finite and > 0 for kept rows, one for each row of the dataset, got shape {weights.shape}"
        )
    generator = _generator(loader)
    sampler = WeightedRandomSampler(kept.tolist(), len(view), generator=generator)
    batches = BatchSampler(sampler, loader.batch_size, loader.drop_last)  # type: ignore[arg-type]
    return copied(loader, dataset=view, sampler=sampler, batch_sampler=batches)


def _drawing(
    loader: DataLoader[Any], dataset: Any, shuffle: bool, size: int | None, drop_last: bool
) -> DataLoader[Any]:
    """Rows of ``dataset`` in batches of ``size``, or one by one for None."""
    generator = _generator(loader)
    rows: Any = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
    if loader.batch_sampler is not None:
        batches = BatchSampler(rows, size, drop_last)  # type: ignore[arg-type]
        return copied(
            loader, dataset=dataset, sampler=rows, batch_sampler=batches, batch_size=size, drop_last=drop_last
        )
    # batch_size=None: the dataset itself puts together what it is asked for
    return copied(loader, dataset=dataset, sampler=rows if size is None else BatchSampler(rows, size, False))


def _generator(loader: DataLoader[Any]) -> torch.Generator | None:
    """Of a sampler that takes the place of the loader's."""
    return loader.sampler.generator if type(loader.sampler) is RandomSampler else loader.generator
