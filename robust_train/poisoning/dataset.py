"""A data set whose rows are poisoned, whatever the structure of its samples."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from robust_train.poisoning.poisons.base import Poison

INPUT_NAMES = ("x", "image", "images", "img", "input", "inputs", "pixel_values", "features", "data")
LABEL_NAMES = ("y", "label", "labels", "target", "targets", "class")
Key = str | int


class PoisonedDataset(Dataset[Any]):
    """Another data set with some of its rows poisoned, or with poisoned rows added at its end.

    The attacker changes stored rows: those that are taken are read once, here, and kept as changed; so memory grows
    with the poison rate alone, and whatever random augmentation ``dataset`` does is frozen for them. Wrap the data set
    before it is augmented. Where only labels change, inputs are read from ``dataset`` each time.

    Args:
        dataset: map-style; its samples are tuples, lists, named tuples or mappings that hold an input (a floating-point
            tensor, of one shape throughout) and a label (a whole number or a tensor of one element).
        poison: what is done to it.
        classes: how many classes there are.
        labels: labels of all rows, N whole numbers; None: every row is read once to see its label.
        input_key: where a sample's input lies, an index or a name; None: 0 in a sequence, and in a mapping the one of
            ``INPUT_NAMES`` that is there.
        label_key: the same for the label; None: 1 in a sequence, or the one of ``LABEL_NAMES``.

    Attributes:
        mask: which rows were changed or added, bool ``(M,)``.
        labels: the labels as they are now, int64 ``(M,)``.

    Raises:
        ValueError: the data set has no rows by number, a sample has no input or label at its place, or the poison does
            not fit.

    Guarantees:
        Rows that are not masked are what ``dataset`` gives; of masked rows all but input and label is. Neither
        ``dataset`` nor its samples are written into. It can be sent to worker processes whenever ``dataset`` can.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        poison: Poison,
        classes: int,
        *,
        labels: Tensor | Sequence[int] | None = None,
        input_key: Key | None = None,
        label_key: Key | None = None,
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise ValueError("an iterable data set has no row numbers; poison a map-style one")
        size = len(dataset)  # pyright: ignore[reportArgumentType]  # torch leaves __len__ to the map-style subclass
        if size == 0 or (labels is not None and len(labels) != size):
            raise ValueError(f"labels must be one a row, for at least one row; there are {size} rows")
        first = dataset[0]  # all samples are built alike
        self._dataset = dataset
        self._input = _key(first, input_key, 0, INPUT_NAMES, "input_key")
        self._label = _key(first, label_key, 1, LABEL_NAMES, "label_key")
        _number(first[self._label])
        if labels is None:
            labels = [_number(dataset[i][self._label]) for i in range(size)]
        given = torch.as_tensor(labels).cpu()
        changed = poison.changes(self._read, given, classes)
        count = len(changed.rows)

        self._inputs = None if poison.relabels_only else changed.x.cpu()
        every = torch.arange(size)
        self._source = torch.cat([every, changed.rows]) if poison.appends else every
        places = torch.arange(size, size + count) if poison.appends else changed.rows
        self._place = torch.full((len(self._source),), -1)  # of a row among the changed ones
        self._place[places] = torch.arange(count)
        self.mask = self._place >= 0
        self.labels = given[self._source]
        self.labels[places] = changed.y.cpu()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        i = int(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of a data set of {len(self)} rows")
        sample = self._dataset[int(self._source[i])]
        if not self.mask[i]:
            return sample
        new: dict[Key, Any] = {self._label: _like(sample[self._label], int(self.labels[i]))}
        if self._inputs is not None:
            new[self._input] = self._inputs[self._place[i]].clone()
        return _replaced(sample, new)

    def _read(self, rows: Tensor) -> Tensor:
        """Inputs ``(K, ...)`` of some rows."""
        inputs = [self._dataset[i][self._input] for i in rows.tolist()]
        if not all(isinstance(x, Tensor) and x.shape == inputs[0].shape for x in inputs):
            raise ValueError("inputs must be tensors of one shape; wrap the data set after its conversion to tensors")
        return torch.stack(inputs)


def _key(sample: Any, asked: Key | None, position: int, names: tuple[str, ...], setting: str) -> Key:
    """Where in a sample the input or the label lies."""
    if isinstance(sample, Mapping):
        found = next((name for name in ((asked,) if asked is not None else names) if name in sample), None)
        there = ", ".join(map(str, sample))
    elif isinstance(sample, (tuple, list)):
        fields, place = _fields(sample), position if asked is None else asked
        place = fields.index(place) if isinstance(place, str) and place in fields else place
        found = place % len(sample) if isinstance(place, int) and -len(sample) <= place < len(sample) else None
        there = ", ".join([*map(str, range(len(sample))), *fields])
    else:
        raise ValueError(f"a sample must be a tuple, list or mapping, got {type(sample).__name__}")
    if found is None:
        raise ValueError(f"{setting}={asked!r} finds nothing in a sample; set it to one of: {there}")
    return found


def _fields(sample: Any) -> tuple[str, ...]:
    """Names of a named tuple's fields."""
    return getattr(sample, "_fields", ())


def _number(label: Any) -> int:
    """A label as a whole number."""
    if not (isinstance(label, Integral) or (isinstance(label, Tensor) and label.numel() == 1)):
        raise ValueError(f"a label must be a whole number or a tensor of one element, got {type(label).__name__}")
    return int(label)


def _like(old: Any, value: int) -> Any:
    """A label of another value, of the same kind."""
    return torch.full_like(old, value) if isinstance(old, Tensor) else type(old)(value)


def _replaced(sample: Any, new: dict[Key, Any]) -> Any:
    """A copy of a sample with some of its parts exchanged."""
    if isinstance(sample, tuple):
        items = [new.get(i, item) for i, item in enumerate(sample)]
        return type(sample)(*items) if _fields(sample) else type(sample)(items)
    out = copy.copy(sample)
    for key, value in new.items():
        out[key] = value
    return out
