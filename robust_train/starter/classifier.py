"""A plain image classifier around any network."""

from typing import Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torchmetrics import MeanMetric

from ._checks import choice, number


class Classifier(pl.LightningModule):
    """Cross-entropy, AdamW or SGD, and the metrics ``{train,val,test}/{loss,acc}``.

    The network is an argument and not a saved hyperparameter: a checkpoint holds its weights, never a pickled module.
    Load one with ``Classifier.load_from_checkpoint(path, network=...)``.

    Args:
        network: maps ``x`` of shape ``(B, ...)`` to logits of shape ``(B, classes)``.
        lr: learning rate; with a schedule its highest value.
        weight_decay: AdamW's decoupled weight decay, or SGD's, which is L2 regularisation.
        schedule: ``"none"``, ``"cosine"`` (from ``lr`` down to 0) or ``"onecycle"`` (up to ``lr`` and down again). Both
            are stretched over the run, however long the Trainer makes it.
        label_smoothing: share of the target that is spread over all classes; training only, so that ``val/loss`` stays
            comparable between runs.
        optimizer: ``"adamw"`` or ``"sgd"``.
        momentum: SGD's heavy-ball momentum; AdamW has its own.

    Raises:
        ValueError: a setting is out of range, or a schedule is asked for in a run without an end.
        TypeError: ``network`` is no module.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Literal["none", "cosine", "onecycle"] = "none",
        label_smoothing: float = 0.0,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        momentum: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch module, got {network!r}")
        number("lr", lr, "a number > 0", 0, with_low=False)
        number("weight_decay", weight_decay, "a number >= 0", 0)
        choice("schedule", schedule, ("none", "cosine", "onecycle"))
        number("label_smoothing", label_smoothing, "in [0, 1)", 0, 1)
        choice("optimizer", optimizer, ("adamw", "sgd"))
        number("momentum", momentum, "in [0, 1)", 0, 1)
        if momentum and optimizer != "sgd":
            raise ValueError(f"momentum must be 0 unless optimizer is sgd, got {momentum}")
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.label_smoothing = label_smoothing
        self.optimizer = optimizer
        self.momentum = momentum
        self.train_acc, self.val_acc, self.test_acc = MeanMetric(), MeanMetric(), MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        self._log("train", self.train_acc, loss, logits, y)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self._log("val", self.val_acc, cross_entropy(logits, y), logits, y)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self._log("test", self.test_acc, cross_entropy(logits, y), logits, y)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        weights, lr, decay = self.parameters(), self.lr, self.weight_decay
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(weights, lr=lr, momentum=self.momentum, weight_decay=decay)
        else:
            optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=decay)
        if self.schedule == "none":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError(
                f"schedule={self.schedule} needs a run with an end: set the Trainer's max_epochs or max_steps"
            )
        if self.schedule == "cosine":
            scheduler = CosineAnnealingLR(optimizer, T_max=int(steps))
        else:
            # The momentum asked for stays as it is; AdamW's has always gone down and up with the learning rate.
            scheduler = OneCycleLR(
                optimizer, max_lr=self.lr, total_steps=int(steps), cycle_momentum=self.optimizer == "adamw"
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _log(self, stage: str, accuracy: MeanMetric, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        accuracy.update((logits.argmax(dim=1) == y).float())
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=len(y))
        self.log(f"{stage}/acc", accuracy, on_step=False, on_epoch=True, batch_size=len(y), prog_bar=stage != "test")
