"""Small data, modules and filters with known answers, for the tests of data filtering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_train.poisoning.filters.base import Filter, Rows, Scores

N, CLASSES, WIDTH = 240, 3, 6


def table(n: int = N, seed: int = 0) -> TensorDataset:
    """Rows ``(x, label, row number)`` in three clusters that a small network tells apart."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = 0.3 * torch.randn(n, WIDTH, generator=g)
    x[torch.arange(n), y] += 3.0
    return TensorDataset(x, y, torch.arange(n))


def flipped(dataset: TensorDataset, share: float = 0.2, seed: int = 0) -> tuple[TensorDataset, Tensor]:
    """Some labels are wrong; and which, bool ``(N,)``."""
    x, y, row = dataset.tensors
    g = torch.Generator().manual_seed(seed)
    bad = torch.rand(len(y), generator=g) < share
    shift = torch.randint(1, CLASSES, (len(y),), generator=g)
    return TensorDataset(x, torch.where(bad, (y + shift) % CLASSES, y), row), bad


class Net(pl.LightningModule):
    """Remembers which rows it was trained on."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.lr, self.seen, self.validated = lr, list[list[int]](), 0

    def forward(self, x):
        return self.net(x)

    def on_train_epoch_start(self):
        self.seen.append([])

    def training_step(self, batch, batch_idx):
        x, y, row = batch
        self.seen[-1] += row.tolist()
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated += 1
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Data(pl.LightningDataModule):
    """The same rows from a data module."""

    def __init__(self, dataset: Any, batch_size: int = 16, **settings: Any) -> None:
        super().__init__()
        self.dataset, self.batch_size, self.settings, self.requests = dataset, batch_size, settings, 0

    def train_dataloader(self):
        self.requests += 1
        return DataLoader(self.dataset, self.batch_size, shuffle=True, **self.settings)

    def val_dataloader(self):
        return DataLoader(table(32, seed=9), 16)


def loader(dataset: Any, batch_size: int = 16, **settings: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, **{"shuffle": True, **settings})


@dataclass(frozen=True)
class Marked(Filter):
    """Flags the rows that it is told, by their number in the last column; no probe is needed."""

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})
    finds: ClassVar[frozenset[str]] = frozenset({"duplicates"})

    rows: tuple[int, ...] = ()

    def score(self, rows: Rows) -> Scores:
        values = torch.zeros(len(rows))
        values[[row for row in self.rows if row < len(rows)]] = 1.0
        return Scores(values)


@dataclass(frozen=True)
class Idle(Filter):
    """Asks for all that a probe shows, and flags nothing."""

    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "features", "logits", "dynamics"})
    finds: ClassVar[frozenset[str]] = frozenset({"label_noise"})

    def score(self, rows: Rows) -> Scores:
        return Scores(torch.zeros(len(rows)))
