"""Train loaders of every kind that users make. Every sample says which row of the dataset it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

N = 24
DROPPED = (1, 4, 5, 6, 7, 13, 20, 23)  # 4 to 7: a whole batch of four in order
KEEP = np.array([i not in DROPPED for i in range(N)])
EVERY = frozenset(range(N))


def rows_of(batch: Any) -> list[int]:
    """Which rows a batch, or a structure of batches, consists of."""
    if isinstance(batch, torch.Tensor):
        return batch.flatten().tolist()
    if isinstance(batch, dict):
        return rows_of(batch["row"]) if "row" in batch else sum(map(rows_of, batch.values()), [])
    if isinstance(batch, (Sample, Record)):
        return rows_of(batch.row)
    return rows_of(batch[-1]) if isinstance(batch[-1], torch.Tensor) else sum(map(rows_of, batch), [])


class Sample(NamedTuple):
    x: torch.Tensor
    row: torch.Tensor


@dataclass
class Record:
    x: torch.Tensor
    row: torch.Tensor


# --- datasets


def tensors(count: int = N) -> TensorDataset:
    return TensorDataset(torch.arange(count * 2.0).view(count, 2), torch.arange(count))


class Items(Dataset[Any]):
    """Samples of any structure; has attributes of its own."""

    classes = ("a", "b")

    def __init__(self, sample: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        return self.sample(torch.full((2,), float(row)), torch.tensor(row))


class Fetching(Items):
    """Fetches a batch at once."""

    def __getitem__(self, row: int) -> Any:
        raise AssertionError("it fetches batches")

    def __getitems__(self, rows: list[int]) -> list[Any]:
        return [super(Fetching, self).__getitem__(row) for row in rows]


class Columns(Dataset[Any]):
    """Like a dataset of Hugging Face: columns, for one row number or a list of them."""

    def __init__(self) -> None:
        self.columns = {"x": [[float(i), 1.0] for i in range(N)], "row": list(range(N))}

    def __len__(self) -> int:
        return N

    def __getitem__(self, key: Any) -> dict[str, Any]:
        if isinstance(key, list):
            return {name: torch.tensor([column[i] for i in key]) for name, column in self.columns.items()}
        assert type(key) is int
        return {name: torch.tensor(column[key]) for name, column in self.columns.items()}

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        batch = self[keys]
        return [{name: column[i] for name, column in batch.items()} for i in range(len(keys))]


class Stream(IterableDataset[Any]):
    """Rows in order, shared out among workers."""

    def __iter__(self) -> Any:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return ((torch.full((2,), float(row)), torch.tensor(row)) for row in range(first, N, step))


# --- samplers


class OwnOrder(Sampler[int]):
    """Every row once, in an order that depends on the epoch; counts its own epochs unless it is told."""

    def __init__(self, count: int = N) -> None:
        self.count, self.epoch = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        yield from np.random.default_rng(self.epoch).permutation(self.count).tolist()
        self.epoch += 1


class EpochOrder(OwnOrder):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[int] = []

    def __iter__(self) -> Any:
        return iter(np.random.default_rng(self.epoch).permutation(self.count))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.told.append(epoch)


class Unaware(Sampler[int]):
    """Other rows in every pass; some never, some twice."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Any:
        return iter([random.randrange(N) for _ in range(10)])


class Unsized(Sampler[int]):
    def __iter__(self) -> Any:
        return iter(range(N))


class SeededShuffle(RandomSampler):
    """A subclass whose order is its own."""

    def __iter__(self) -> Any:
        return iter(torch.randperm(len(self.data_source), generator=torch.Generator().manual_seed(3)).tolist())


class OwnShard(DistributedSampler):
    """A subclass, so that its rows are its own choice."""


class Bucketed(BatchSampler):
    """Rows of one bucket (even, odd) share a batch, as far as they fill one; each row once."""

    def __iter__(self) -> Any:
        buckets: dict[int, list[int]] = {0: [], 1: []}
        for row in self.sampler:
            bucket = buckets[row % 2]
            bucket.append(row)
            if len(bucket) == self.batch_size:
                yield list(bucket)
                bucket.clear()
        rest = sum(buckets.values(), [])
        yield from (rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size))


class Grouped:
    """The same batches in every pass, in another order; no subclass of torch's."""

    def __init__(self) -> None:
        self.batches = [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9), (10,), (13,), (11, 12, 14), tuple(range(15, N))]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter([self.batches[i] for i in torch.randperm(len(self.batches)).tolist()])


class Shuffled:
    """Other batches in every pass, in which batches are lost now and then; the last one small."""

    def __len__(self) -> int:
        return -(-N // 3)

    def __iter__(self) -> Any:
        return iter(torch.randperm(N).split(3))


# --- loaders


class Collating(DataLoader[Any]):
    """Makes its own collate function, as PyTorch Geometric does."""

    def __init__(self, dataset: Any, batch_size: int = 1, shuffle: bool = False, follow: Any = None, **kw: Any) -> None:
        kw.pop("collate_fn", None)
        self.follow = follow
        super().__init__(dataset, batch_size, shuffle, collate_fn=as_record, **kw)


class Doubling(DataLoader[Any]):
    """Works on each batch."""

    def __iter__(self) -> Any:
        for x, row in super().__iter__():
            yield x * 2, row


class OwnData(DataLoader[Any]):
    """Makes its dataset itself."""

    def __init__(self, count: int, **kw: Any) -> None:
        super().__init__(tensors(count), **kw)


class Bypassing(DataLoader[Any]):
    """Reads rows past its dataset."""

    def __iter__(self) -> Any:
        tensors_ = tensors().tensors
        return (tuple(tensor[batch] for tensor in tensors_) for batch in self.batch_sampler)


class Endless(DataLoader[Any]):
    """Keeps its iterator."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.iterator = super().__iter__()


def as_record(samples: list[Any]) -> Record:
    return Record(torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples]))


def with_lengths(samples: list[Any]) -> dict[str, torch.Tensor]:
    return {"x": torch.cat([s[0] for s in samples]), "row": torch.stack([s[1] for s in samples])}


def nothing(worker: int) -> None:
    """A worker's init function."""


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def unbatched(**settings: Any) -> DataLoader[Any]:
    return DataLoader(tensors(), batch_size=None, **settings)


ODD = [i for i in range(N) if i % 2]
LIKELY = torch.arange(1, N + 1).double()


@dataclass(frozen=True)
class Kind:
    """A way to make a train loader.

    Args:
        make: makes one; called in a ``train_dataloader`` hook.
        rows: those that its sampler yields in each epoch, each once; None: whichever it draws.
        batches: how many with ``KEEP``; None: not checked.
    """

    make: Callable[[], Any]
    rows: frozenset[int] | None = EVERY
    batches: int | None = None


def kept(loader: Callable[[], Any], batches: int | None = None) -> Kind:
    return Kind(loader, batches=batches)


def drawn(loader: Callable[[], Any], batches: int | None = None) -> Kind:
    return Kind(loader, None, batches)


KINDS: dict[str, Kind] = {
    "shuffled": kept(lambda: DataLoader(tensors(), 4, shuffle=True), 4),
    "sequential": kept(lambda: DataLoader(tensors(), batch_size=5), 4),
    "positional": kept(lambda: DataLoader(tensors(), 5, True), 4),
    "generator": kept(lambda: DataLoader(tensors(), 4, shuffle=True, drop_last=True, generator=generator()), 4),
    "drop_last": drawn(lambda: DataLoader(tensors(), 5, shuffle=True, drop_last=True), 3),
    "workers": kept(lambda: DataLoader(tensors(), 4, shuffle=True, num_workers=2, prefetch_factor=3), 4),
    "persistent_workers": kept(
        lambda: DataLoader(tensors(), 4, shuffle=True, num_workers=2, persistent_workers=True, in_order=True), 4
    ),
    "worker_settings": kept(
        lambda: DataLoader(
            tensors(), 4, num_workers=1, timeout=60, worker_init_fn=nothing, multiprocessing_context="fork"
        ),
        4,
    ),
    "pin_memory": kept(lambda: DataLoader(tensors(), 4, shuffle=True, pin_memory=True), 4),
    "dicts": kept(lambda: DataLoader(Items(lambda x, row: {"x": x, "row": row}), 4, shuffle=True), 4),
    "named_tuples": kept(lambda: DataLoader(Items(Sample), 4, shuffle=True), 4),
    "dataclasses": kept(lambda: DataLoader(tensors(), 4, shuffle=True, collate_fn=as_record), 4),
    "collate": kept(lambda: DataLoader(tensors(), 4, shuffle=True, collate_fn=with_lengths), 4),
    "getitems": kept(lambda: DataLoader(Fetching(lambda x, row: (x, row)), 4, shuffle=True), 4),
    "hugging_face": kept(lambda: DataLoader(Columns(), 4, shuffle=True), 4),
    "hugging_face_lists": kept(
        lambda: DataLoader(Columns(), None, sampler=BatchSampler(RandomSampler(range(N)), 4, False)), 4
    ),
    "row_numbers": kept(lambda: DataLoader(range(N), 4, shuffle=True), 4),
    "subset": Kind(lambda: DataLoader(Subset(Subset(tensors(100), range(50)), range(N)), 4, shuffle=True), batches=4),
    "concat": kept(lambda: DataLoader(ConcatDataset([Subset(tensors(), range(9)), Subset(tensors(), range(9, N))]), 4)),
    "stack": kept(lambda: DataLoader(StackDataset(torch.ones(N, 2), torch.arange(N)), 4, shuffle=True), 4),
    "stack_of_names": kept(lambda: DataLoader(StackDataset(x=torch.ones(N, 2), row=torch.arange(N)), 4), 4),
    "weighted": drawn(lambda: DataLoader(tensors(), 4, sampler=WeightedRandomSampler(LIKELY.tolist(), N))),
    "weighted_once": kept(
        lambda: DataLoader(tensors(), 4, sampler=WeightedRandomSampler(LIKELY.tolist(), N, False)), 4
    ),
    "subset_random": Kind(lambda: DataLoader(tensors(), 4, sampler=SubsetRandomSampler(ODD)), frozenset(ODD), 2),
    "replacement": drawn(lambda: DataLoader(tensors(), 4, sampler=RandomSampler(range(N), replacement=True)), 4),
    "replacement_count": drawn(
        lambda: DataLoader(tensors(), 4, sampler=RandomSampler(range(N), replacement=True, num_samples=12)), 2
    ),
    "num_samples": drawn(lambda: DataLoader(tensors(), 4, sampler=RandomSampler(range(N), num_samples=12)), 2),
    "half": Kind(lambda: DataLoader(tensors(), 4, sampler=SequentialSampler(range(12))), frozenset(range(12)), 2),
    "list_sampler": Kind(lambda: DataLoader(tensors(), 4, sampler=ODD), frozenset(ODD), 2),
    "own_sampler": kept(lambda: DataLoader(tensors(), 4, sampler=OwnOrder()), 4),
    "own_sampler_with_epochs": kept(lambda: DataLoader(tensors(), 4, sampler=EpochOrder()), 4),
    "own_sampler_with_replacement": drawn(lambda: DataLoader(tensors(), 4, sampler=Unaware()), 2),
    "random_subclass": kept(lambda: DataLoader(tensors(), 4, sampler=SeededShuffle(range(N))), 4),
    "unsized_sampler": kept(lambda: DataLoader(tensors(), 4, sampler=Unsized()), 4),
    "batch_sampler": kept(
        lambda: DataLoader(tensors(), batch_sampler=BatchSampler(RandomSampler(range(N)), 4, False)), 4
    ),
    "bucketed": kept(lambda: DataLoader(tensors(), batch_sampler=Bucketed(RandomSampler(range(N)), 4, False)), 6),
    "grouped": kept(lambda: DataLoader(tensors(), batch_sampler=Grouped()), 5),
    "shuffled_batches": kept(lambda: DataLoader(tensors(), batch_sampler=Shuffled()), 8),
    "bucketed_workers": kept(
        lambda: DataLoader(tensors(), batch_sampler=Bucketed(RandomSampler(range(N)), 4, False), num_workers=2), 6
    ),
    "unbatched": kept(lambda: unbatched(shuffle=True), N - len(DROPPED)),
    "unbatched_sampler": kept(lambda: unbatched(sampler=OwnOrder()), N - len(DROPPED)),
    "unbatched_batches": kept(lambda: unbatched(sampler=BatchSampler(RandomSampler(range(N)), 4, False)), 4),
    "unbatched_tensors": kept(lambda: unbatched(sampler=Shuffled()), 8),
    "unbatched_bucketed": kept(lambda: unbatched(sampler=Bucketed(RandomSampler(range(N)), 4, False)), 6),
    "distributed": Kind(
        lambda: DataLoader(tensors(), 4, sampler=DistributedSampler(range(N), 1, 0, shuffle=True, seed=7)), batches=4
    ),
    "distributed_subclass": kept(lambda: DataLoader(tensors(), 4, sampler=OwnShard(range(N), 1, 0)), 4),
    "collating_subclass": kept(lambda: Collating(tensors(), batch_size=4, shuffle=True, follow="x"), 4),
    "doubling_subclass": kept(lambda: Doubling(tensors(), batch_size=4, shuffle=True, num_workers=1), 4),
    "own_data_subclass": kept(lambda: OwnData(N, batch_size=4, shuffle=True), 4),
    "list_of_loaders": drawn(lambda: [DataLoader(tensors(), 4, shuffle=True), DataLoader(tensors(), 6)], 4),
    "dict_of_loaders": drawn(lambda: {"a": DataLoader(tensors(), 4), "b": {"c": DataLoader(tensors(), 6)}}, 4),
    "combined": drawn(
        lambda: CombinedLoader({"a": DataLoader(tensors(), 4), "b": DataLoader(tensors(), 6)}, "max_size_cycle"), 4
    ),
}

STREAMS: dict[str, Callable[[], Any]] = {
    "stream": lambda: DataLoader(Stream(), 4),
    "stream_worker": lambda: DataLoader(Stream(), 4, num_workers=1),
    "stream_workers": lambda: DataLoader(Stream(), 4, num_workers=2, persistent_workers=True),
    "stream_of_samples": lambda: DataLoader(Stream(), batch_size=None),
}
