"""Tiny data sets, as many ways of handing them over as the modules next door need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

CLASSES = 3


class Records(Dataset):
    """Rows of tensors, each handed out as a tuple. The tensors are views of the data set's own, never copies."""

    def __init__(self, *columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return tuple(column[i] for column in self.columns)


def image_columns(n: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) in [0, 1] whose class is the brightest third; labels (n,)."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = torch.rand(n, 1, 8, 8, generator=g) * 0.6
    for i, label in enumerate(y.tolist()):
        x[i, :, label * 2 : label * 2 + 3] += 0.4
    return x, y


def table_columns(n: int = 20, features: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unbounded features (n, features) and labels (n,)."""
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :CLASSES].argmax(1)


def loader(*columns: Tensor, as_batch: Callable[..., Any] | None = None, shuffle: bool = False) -> DataLoader:
    """Batches of 8, the last one smaller; ``as_batch(*columns)`` makes the container."""

    def collate(rows: list[tuple[Tensor, ...]]) -> Any:
        stacked = default_collate(rows)
        return stacked if as_batch is None else as_batch(*stacked)

    return DataLoader(Records(*columns), batch_size=8, shuffle=shuffle, collate_fn=collate)


def loaders(columns: Callable[..., tuple[Tensor, ...]], as_batch: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Arguments of ``Trainer.fit``: shuffled training data, and validation data."""
    return {
        "train_dataloaders": loader(*columns(), as_batch=as_batch, shuffle=True),
        "val_dataloaders": loader(*columns(n=12, seed=1), as_batch=as_batch),
    }
