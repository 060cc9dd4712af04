"""Small data, modules and filters with known answers, for the tests of data filtering."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign.runs import make_trainer, portrait, seed_all
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from robust_train import DataFilter, Policy, Probe
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


BAD = (3, 4, 5, 77, 150, 239)  # what is marked
BRIEF = Probe(epochs=2)


def marking(rows=BAD, **settings) -> DataFilter:
    policy = Policy(max_drop=0.9, max_drop_per_class=0.9)
    return DataFilter(**{"filters": {"marked": Marked(tuple(rows))}, "policy": policy, **settings})


def idle(**settings) -> DataFilter:
    return DataFilter(**{"filters": {"idle": Idle()}, "probe": BRIEF, **settings})


def run(callback, data=None, *others, module=None, seed=0, **settings):
    """A short fit; ``data`` is a dataset, a loader, a structure of loaders, or a data module."""
    seed_all(seed)
    data = table() if data is None else data
    data = loader(data) if isinstance(data, Dataset) else data
    module = Net() if module is None else module
    callbacks = [c for c in (callback, *others) if c is not None]
    trainer = make_trainer(pl.Trainer, *callbacks, **{"max_epochs": 1, "limit_val_batches": 0, **settings})
    kind = "datamodule" if isinstance(data, pl.LightningDataModule) else "train_dataloaders"
    trainer.fit(module, **{kind: data})
    return module, trainer


def report() -> dict[str, Any]:
    return json.loads(Path("filter_report.json").read_text())


def trace(found) -> dict[str, Any]:
    """All that must be the same, but for what the callback itself logs."""
    history = [(step, {k: v for k, v in m.items() if not k.startswith("filter/")}) for step, m in found.logger.history]
    history = [(step, m) for step, m in history if set(m) - {"epoch"}]
    metrics = {k: v for k, v in found.trace["metrics"].items() if not k.startswith("filter/")}
    return {**found.trace, "history": portrait(history), "metrics": metrics}


def checkpointed(folder="first", **settings):
    saving = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
    return [saving], {"enable_checkpointing": True, "default_root_dir": folder, **settings}


def rates(callback, bad) -> tuple[float, float]:
    left_out = torch.from_numpy(~callback.kept)
    return float(left_out[bad].float().mean()), float(left_out[~bad].float().mean())


def even(example) -> bool:
    return int(example[2]) % 2 == 0


class Stream(IterableDataset):
    def __iter__(self):
        return iter([table()[i] for i in range(N)])
