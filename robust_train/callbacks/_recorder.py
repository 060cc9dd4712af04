"""Which rows each batch of a train loader consists of."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from robust_train.callbacks import _loaders
from robust_train.callbacks._samplers import is_batch, row_numbers


class Recorder:
    """Row numbers of each batch of one loader, in the order in which the batches are delivered.

    Row numbers are drawn in the main process and batches come in the order in which they were drawn, also from workers;
    so neither the dataset nor a batch is touched. For several processes and for ``overfit_batches`` Lightning puts
    samplers of its own into a loader: attach it after that (``_seams.exchange_prepared_loader``).

    Guarantees:
        The loader delivers the batches that it would deliver otherwise, and draws the same random numbers.

    Example:
        >>> recorder = Recorder()
        >>> for batch in recorder.attach(DataLoader(range(4), batch_size=2)):
        ...     print(batch.tolist(), recorder.pop().tolist())
        [0, 1] [0, 1]
        [2, 3] [2, 3]
    """

    def __init__(self) -> None:
        self._drawn: deque[np.ndarray] = deque()  # in the running pass, not delivered yet: workers are ahead
        self._delivered: deque[np.ndarray] = deque()  # not popped yet: Lightning may fetch a batch before its turn
        self._through = True  # the last pass was not broken off

    def attach(self, loader: Any) -> DataLoader[Any]:
        """A copy of ``loader``, of a subclass of its class, whose batches are recorded from here on.

        What was recorded of another loader is forgotten.

        Raises:
            ValueError: its batches cannot be told from the rows that were drawn; the message says why.
        """
        loader = _loaders.check_loader(loader)
        if loader.num_workers and not loader.in_order:
            raise ValueError(
                "the train loader has in_order=False: which rows a batch consists of is not known. Remove in_order"
            )
        self.__init__()
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        new = _loaders.copied(loader, **{name: _Recorded(self, getattr(loader, name), loader.dataset)})
        object.__setattr__(new, "__class__", _delivering_to(self, type(loader)))  # not noted by Lightning
        return new

    def pop(self) -> np.ndarray:
        """Row numbers of the oldest batch that was not popped yet; to be called once for each batch.

        Returns:
            int64 ``(B,)``. If the loader shows kept rows only, they are those of the whole dataset.

        Raises:
            RuntimeError: there is none.
        """
        if not self._delivered:
            raise RuntimeError("the recorded loader delivered no batch since the last one was popped")
        return self._delivered.popleft()

    def begin(self) -> deque[np.ndarray]:
        """A pass begins; where its rows are to be noted."""
        if not self._through:  # of a pass that was broken off, what is not popped by now was not used
            self._delivered.clear()
        self._drawn, self._through = deque(), False
        return self._drawn

    def deliver(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Notes each batch of a pass as delivered."""
        for batch in batches:
            if not self._drawn:
                raise RuntimeError("the train loader delivers more batches than its sampler drew: they cannot be told")
            self._delivered.append(self._drawn.popleft())
            yield batch
        self._through = True


class _Recorded:
    """Yields what the loader's sampler does, and notes it. Everything else about it is that sampler's."""

    def __init__(self, recorder: Recorder, base: Any, dataset: Any) -> None:
        self._recorder, self.base, self._dataset = recorder, base, dataset

    def __iter__(self) -> Iterator[Any]:
        return self._noted(iter(self.base), self._recorder.begin())  # the former at once: it may draw random numbers

    def _noted(self, elements: Iterator[Any], drawn: deque[np.ndarray]) -> Iterator[Any]:
        for element in elements:
            rows = row_numbers(element if is_batch(element) else [element], len(self._dataset))
            drawn.append(_loaders.original_rows(self._dataset, rows))
            yield element

    def __len__(self) -> int:
        return len(self.base)

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.base, name)


def _delivering_to(recorder: Recorder, kind: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    def begin_pass(self: DataLoader[Any]) -> Iterator[Any]:
        return recorder.deliver(iter(kind.__iter__(self)))

    return type(kind.__name__, (kind,), {"__iter__": begin_pass, "__module__": kind.__module__})
