"""Modules by third parties, as far as the shape of their batches goes. None knows of adversarial examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign.data import CLASSES, image_columns, loader
from torch import Tensor, nn


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, CLASSES)
    )


class TupleBatch(pl.LightningModule):
    """The tutorial's module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convnet()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class DictBatch(TupleBatch):
    """``{"image", "label", "name"}``; forward takes the image."""

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch["image"]), batch["label"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch["image"]), batch["label"]))

    test_step = validation_step


def named_images(x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"name": [f"image {i}" for i in range(len(x))], "label": y, "image": x}


class WholeDict(TupleBatch):
    """forward takes the whole dict and returns another, as libraries of pretrained models do."""

    def forward(self, batch):
        logits = self.net(batch["pixel_values"])
        return {"loss": F.cross_entropy(logits, batch["labels"]), "logits": logits}

    def training_step(self, batch, batch_idx):
        outputs = self(batch)
        self.log("train_loss", outputs["loss"])
        return outputs["loss"]

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch)["loss"])

    test_step = validation_step


@dataclass
class Sample:
    label: Tensor
    image: Tensor
    source: str = "camera"


@dataclass(frozen=True)
class FrozenSample:
    label: Tensor
    image: Tensor

    def to(self, device, **kwargs):  # Lightning moves what has this method as a whole
        return FrozenSample(self.label.to(device), self.image.to(device))


class DataclassBatch(TupleBatch):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch.image), batch.label)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch.image), batch.label), batch_size=len(batch.label))

    test_step = validation_step


class Pair(NamedTuple):
    target: Tensor
    inputs: Tensor


class NamedTupleBatch(TupleBatch):
    """No ``batch_idx``."""

    def training_step(self, batch):
        return F.cross_entropy(self(batch.inputs), batch.target)

    def validation_step(self, batch):
        self.log("val_loss", F.cross_entropy(self(batch.inputs), batch.target))

    test_step = validation_step


class NestedBatch(TupleBatch):
    """Two views of each image, and the labels two levels down."""

    def training_step(self, batch, batch_idx):
        first, second = batch["views"]
        agreement = F.mse_loss(self(first).softmax(1), self(second).softmax(1))
        return F.cross_entropy(self(first), batch["meta"]["label"]) + agreement

    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch["views"][0]), batch["meta"]["label"])
        self.log("val_loss", loss, batch_size=len(batch["views"][0]))

    test_step = validation_step


def two_views(x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"meta": {"id": [str(i) for i in range(len(x))], "label": y}, "views": [x, x.flip(-1)]}


class BytesToFloats(pl.LightningDataModule):
    """Images travel as uint8; the hook makes them floats on the device and adds noise while training."""

    def train_dataloader(self):
        x, y = image_columns()
        return loader((x * 255).byte(), y, shuffle=True)

    def val_dataloader(self):
        x, y = image_columns(n=12, seed=1)
        return loader((x * 255).byte(), y)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        x = x.float() / 255
        return (x + 0.1 * torch.rand_like(x)).clamp(0, 1) if self.trainer.training else x, y


class ImageAndTable(TupleBatch):
    """Two inputs, both given to forward."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(6, CLASSES)

    def forward(self, image, table):
        return self.net(image) + self.side(table)

    def training_step(self, batch, batch_idx):
        table, image, y = batch
        return F.cross_entropy(self(image, table), y)

    def validation_step(self, batch, batch_idx):
        table, image, y = batch
        self.log("val_loss", F.cross_entropy(self(image, table), y))

    test_step = validation_step


class MutatesBatch(TupleBatch):
    """Takes its labels out of the batch and writes into the images."""

    def training_step(self, batch, batch_idx):
        y = batch.pop("y")
        x = batch["x"]
        x.mul_(2).sub_(1)
        batch["seen"] = True
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        y = batch.pop("y")
        self.log("val_loss", F.cross_entropy(self(batch["x"].mul_(2).sub_(1)), y))

    test_step = validation_step


class StashesInBatch(TupleBatch):
    """Leaves something in the batch for a later hook."""

    def training_step(self, batch, batch_idx):
        logits = self(batch["x"])
        batch["logits"] = logits.detach()
        return F.cross_entropy(logits, batch["y"])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("confidence", batch["logits"].softmax(1).amax(1).mean())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch["x"]), batch["y"]))

    test_step = validation_step
