"""Modules by third parties for other tasks than plain image classification, and other ways to call the network."""

from __future__ import annotations

from types import SimpleNamespace

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch, convnet
from foreign.data import CLASSES, image_columns, table_columns
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Segmentation(TupleBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1))


def masks(n: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and, for each pixel, whether it is bright."""
    x, _ = image_columns(n, seed)
    return x, (x[:, 0] > 0.5).long()


class Tabular(TupleBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, CLASSES))


class TabularBinary(pl.LightningModule):
    """One logit, float labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
        self.criterion = nn.BCEWithLogitsLoss()

    def forward(self, x):
        return self.net(x).squeeze(1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", self.criterion(self(x), y))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def binary_table(n: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, _ = table_columns(n, seed=seed)
    return x, (x.sum(1) > 0).float()


class Regression(TabularBinary):
    """Predicts two numbers; its validation step returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)), nn.MSELoss()

    def forward(self, x):
        return self.net(x)


def two_numbers(n: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, _ = table_columns(n, seed=seed)
    return x, x[:, :2] * 3 + 1


class SoftLabels(TupleBatch):
    """Labels are distributions over the classes."""


def distributions(n: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = image_columns(n, seed)
    return x, F.one_hot(y, CLASSES) * 0.8 + 0.2 / CLASSES


class NormalisesInside(TupleBatch):
    def forward(self, x):
        return self.net((x - 0.3) / 0.25)


class EncoderAndHead(pl.LightningModule):
    """The step never calls ``self(...)``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES), nn.ReLU())
        self.head = nn.Linear(CLASSES, CLASSES)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.encoder(x)), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.head(self.encoder(x)), y))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ReturnsObject(TupleBatch):
    """forward returns an object with ``.logits``."""

    def forward(self, x):
        return SimpleNamespace(hidden=x.flatten(1), logits=self.net(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x).logits, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x).logits, y))

    test_step = validation_step


class CompiledInside(TupleBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(convnet())


class FrozenBackbone(TupleBatch):
    """Fine-tuning: a backbone without gradients whose batch normalisation is held in eval mode by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2))
        self.backbone.requires_grad_(False)
        self.net = nn.Sequential(nn.Dropout(0.1), nn.Flatten(), nn.Linear(128, CLASSES))

    def forward(self, x):
        return self.net(self.backbone(x))

    def on_train_epoch_start(self):
        self.backbone.eval()


class GradientPenalty(TupleBatch):
    """Differentiates in its own input inside the step."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x.requires_grad_(True)
        logits = self(x)
        (slope,) = torch.autograd.grad(logits.logsumexp(1).sum(), x, create_graph=True)
        return F.cross_entropy(logits, y) + 0.1 * slope.flatten(1).norm(dim=1).mean()


class Checkpointed(TupleBatch):
    """Recomputes activations in the backward pass to save memory."""

    def forward(self, x):
        return self.net[4](self.net[3](checkpoint(self.net[:3], x, use_reentrant=False)))


class Recurrent(TupleBatch):
    """Reads an image row by row and carries its hidden state on to the next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.net = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, CLASSES)
        self.hidden = None

    def forward(self, x, hidden=None):
        out, hidden = self.rnn(x[:, 0], hidden)
        return self.net(out[:, -1]), hidden

    def training_step(self, batch, batch_idx):
        x, y = batch
        usable = self.hidden is not None and self.hidden[0].shape[1] == len(x)
        logits, hidden = self(x, self.hidden if usable else None)
        self.hidden = tuple(h.detach() for h in hidden)
        return F.cross_entropy(logits, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x)[0], y))

    test_step = validation_step
