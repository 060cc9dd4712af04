"""The user's train loader with Poisson sampling in place of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.sampler import BatchSampler

from robust_train.callbacks import _seams
from robust_train.privacy.entropy import Entropy
from robust_train.privacy.sampling import PoissonBatches, micro_batches_for


class PoissonLoader:
    """Yields what the user's loader would, for batches that were drawn by Poisson sampling.

    No ``DataLoader``, on purpose: Lightning would put a ``DistributedSampler`` into one. Attributes that are not its
    own are those of the loader it wraps (``trainer.train_dataloader.dataset``).

    Args:
        loader: the user's.
        batches: which examples make up each batch.
        begun: asked when a pass begins: how many micro-batches of its first logical batch are over (in a run that
            was interrupted between two optimizer steps).
        public_size: number of examples, as the public knows it.
    """

    def __init__(
        self, loader: DataLoader[Any], batches: PoissonBatches, begun: Callable[[], int], public_size: int
    ) -> None:
        self.batches, self._begun, self.public_size = batches, begun, public_size
        self._loader: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def __iter__(self) -> Iterator[Any]:
        # a generator: nothing is drawn before the loop asks for its first batch, when its progress is restored
        self.batches.skip = self._begun()
        for batch in self._loader:
            if batch is None:
                raise RuntimeError(
                    "DPSGD: the collate function returned None for a batch; under DP-SGD every sampled example must "
                    "reach the training step. Remove what cannot be loaded from the dataset beforehand"
                )
            yield batch

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # while being unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)


def poisson_loader(
    trainer: Any,
    loader: Any,
    entropy: Entropy,
    *,
    accumulate: int,
    sample_rate: float | None,
    dataset_size: int | None,
    physical_batch_size: int | None,
    views: int,
) -> PoissonLoader:
    """The user's train loader with Poisson batches; the Trainer counts in micro-batches from here on.

    A logical batch is what all processes see in one optimizer step. What the user counts in batches of the loader
    (limits, intervals of validation) is translated, so that an epoch has as many steps as it had.

    Args:
        trainer: whose counting is changed.
        loader: the user's.
        entropy: where the coin flips come from.
        accumulate: the user's ``accumulate_grad_batches``.
        sample_rate: of each example; None: that of the loader's batches.
        dataset_size: number of examples, as the public knows it; None: the dataset's.
        physical_batch_size: most rows in a micro-batch; None: one micro-batch for each batch of the user's.
        views: rows of each example.
    """
    loader = check_loader(loader)
    size, world, limit = len(loader.dataset), trainer.world_size, trainer.limit_train_batches  # type: ignore[arg-type]
    public_size = dataset_size or size
    if sample_rate is None:
        sample_rate = min(1.0, loader.batch_size * accumulate * world / public_size)  # type: ignore[operator]
        count = math.floor if loader.drop_last else math.ceil
        batches = max(1, count(math.ceil(public_size / world) / loader.batch_size))  # type: ignore[operator]
        steps = math.ceil(batches / accumulate)
    else:
        steps = round(1 / sample_rate)
    steps = min(steps, math.ceil(limit / accumulate)) if isinstance(limit, int) else max(1, int(steps * limit))
    k = accumulate
    if physical_batch_size is not None:
        k = micro_batches_for(size, sample_rate, world, physical_batch_size // views)
    interval = trainer.val_check_interval
    if isinstance(interval, int):
        trainer.val_check_interval = math.ceil(interval / accumulate) * k
    trainer.accumulate_grad_batches, trainer.limit_train_batches = k, 1.0
    sampler = PoissonBatches(
        size, sample_rate, steps, k, views=views, rank=trainer.global_rank, world=world, entropy=entropy
    )
    return PoissonLoader(loader, sampler, lambda: _seams.micro_batches_begun(trainer) % k, public_size)


def check_loader(loader: Any) -> DataLoader[Any]:
    """The user's train loader, if Poisson sampling can stand in for its own.

    Raises:
        ValueError: it cannot; the message says why, and what to change.
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"DPSGD needs one DataLoader for training, got {type(loader).__name__}: Poisson sampling draws from one "
            "map-style dataset. Put several together with torch.utils.data.ConcatDataset"
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise ValueError(
            f"DPSGD cannot sample from {type(loader.dataset).__name__}: an iterable dataset has no examples to draw by "
            "coin flips. Use a map-style dataset (with __getitem__ and __len__)"
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"DPSGD cannot draw the batches of {type(loader).__name__}, which overrides DataLoader.__iter__: use a "
            "plain DataLoader, and do the work in collate_fn or in on_after_batch_transfer"
        )
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        raise ValueError(
            f"DPSGD draws batches itself, and the train loader has a batch sampler of its own "
            f"({type(loader.batch_sampler).__name__}): give it batch_size, and no batch_sampler"
        )
    if type(loader.sampler) not in (RandomSampler, SequentialSampler, DistributedSampler) or getattr(
        loader.sampler, "replacement", False
    ):
        raise ValueError(
            f"DPSGD draws every example with the same probability, and the train loader's sampler is "
            f"{type(loader.sampler).__name__}, whose choice the accounting does not know: use shuffle=True. For a part "
            "of the data use torch.utils.data.Subset; for rare classes weight the loss of each example"
        )
    if len(loader.dataset) == 0:  # type: ignore[arg-type]
        raise ValueError("DPSGD: the training dataset is empty")
    return loader
