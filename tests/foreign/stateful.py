"""Modules by third parties that remember things: all of it must come out as if no attack had ever called their step."""

from __future__ import annotations

import copy
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import lightning.pytorch as unified
import numpy as np
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch, convnet
from foreign.data import CLASSES
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


class AverageMeter:
    """From a thousand repositories."""

    def __init__(self) -> None:
        self.value = self.sum = self.count = 0.0

    def update(self, value, n=1):
        self.value, self.sum, self.count = value, self.sum + value * n, self.count + n


class Nasty(TupleBatch):
    """Everything at once: three sources of randomness, a generator of its own, mixup, dropout, batch and spectral
    normalisation, metrics, lists, meters and counters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.utils.parametrizations.spectral_norm(nn.Linear(4 * 64, CLASSES)),
        )
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.metrics = MetricCollection([MulticlassF1Score(CLASSES), MulticlassAccuracy(CLASSES)], prefix="train_")
        self.mean_loss = MeanMetric()
        self.rng = np.random.default_rng(7)
        self.meter, self.seen = AverageMeter(), Counter()
        self.steps, self.recent = 0, deque(maxlen=4)
        self.training_step_outputs: list[Tensor] = []
        self.register_buffer("center", torch.zeros(CLASSES))
        self.running = torch.zeros(())

    def training_step(self, batch, batch_idx):
        x, y = batch
        if random.random() < 0.8:  # noqa: S311
            weight = float(np.random.beta(0.4, 0.4)) * float(self.rng.uniform(0.5, 1.0))
            order = torch.randperm(len(x))
            x = weight * x + (1 - weight) * x[order]
        logits = self(x + 0.01 * torch.randn_like(x))
        loss = F.cross_entropy(logits - 0.1 * self.center, y)
        self.center = 0.9 * self.center + 0.1 * logits.detach().mean(0)
        self.running += loss.detach()
        self.steps += 1
        self.meter.update(loss.item(), len(x))
        self.seen.update(y.tolist())
        self.recent.append(loss.item())
        self.training_step_outputs.append(loss)
        self.accuracy(logits, y)
        self.mean_loss.update(loss)
        self.log("train_acc", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict(self.metrics(logits, y), on_step=False, on_epoch=True)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def on_train_epoch_end(self):
        self.log("epoch_loss", torch.stack([loss.detach() for loss in self.training_step_outputs]).mean())
        self.log("mean_loss", self.mean_loss.compute())
        self.mean_loss.reset()
        self.training_step_outputs.clear()


class WithMetrics(TupleBatch):
    """Metrics logged as objects; the validation ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.train_acc = MulticlassAccuracy(CLASSES)
        scores = MetricCollection({"acc": MulticlassAccuracy(CLASSES), "f1": MulticlassF1Score(CLASSES)})
        self.train_scores, self.val_scores = scores.clone(prefix="train/"), scores.clone(prefix="val/")

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.train_acc(logits, y)
        self.train_scores(logits, y)
        self.log("train_acc", self.train_acc)
        self.log_dict(self.train_scores, on_step=True, on_epoch=True)
        return F.cross_entropy(logits, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.val_scores.update(self(x), y)
        self.log_dict(self.val_scores)

    test_step = validation_step


class MomentumTeacher(TupleBatch):
    """The teacher is a moving average of the student, updated inside the step."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def get_teacher(self):
        return self.teacher

    def update_teacher(self):
        with torch.no_grad():
            for t, s in zip(self.get_teacher().parameters(), self.net.parameters(), strict=True):
                t.lerp_(s, 0.1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.update_teacher()
        with torch.no_grad():
            guide = self.get_teacher()(x).softmax(1)
        logits = self(x)
        return F.cross_entropy(logits, y) + F.cross_entropy(logits, guide)


class TeacherThroughData(MomentumTeacher):
    """The same through ``.data``, which autograd does not see."""

    def update_teacher(self):
        for t, s in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            t.data.mul_(0.9).add_(s.data, alpha=0.1)


class TeacherEverySecondBatch(MomentumTeacher):
    """The same, but not with the first batch of an epoch."""

    def training_step(self, batch, batch_idx):
        self.batch_idx = batch_idx
        return super().training_step(batch, batch_idx)

    def update_teacher(self):
        if self.batch_idx % 2:
            super().update_teacher()


class HiddenTeacher(MomentumTeacher):
    """The teacher in a list, so that it stays out of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.teacher]
        del self.teacher

    def get_teacher(self):
        return self.hidden[0]


class Queue(TupleBatch):
    """A memory bank in buffers, written in place, as contrastive learning has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(16, CLASSES))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long), persistent=False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y) + (logits @ self.queue.clone().T).logsumexp(1).mean() * 0.1
        where = (int(self.pointer) + torch.arange(len(x))) % 16
        self.queue[where] = logits.detach()
        self.pointer[0] = (self.pointer[0] + len(x)) % 16
        return loss


@dataclass
class Ledger:
    totals: Tensor = field(default_factory=lambda: torch.zeros(CLASSES))
    by_class: dict[int, list[float]] = field(default_factory=dict)


@dataclass(slots=True)
class SlottedMeter:
    total: float = 0.0
    count: int = 0


class Bookkeeper(TupleBatch):
    """State in lists, dicts, sets, records and generators, written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.counts, self.seen = Ledger(), [0] * CLASSES, set()
        self.stats = {"loss": torch.zeros(1), "nested": {"n": 0}}
        self.dice, self.shuffler = random.Random(3), torch.Generator().manual_seed(3)  # noqa: S311

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x + 0.01 * torch.rand(x.shape, generator=self.shuffler) * self.dice.random())
        loss = F.cross_entropy(logits, y)
        for truth, guess in zip(y.tolist(), logits.argmax(1).tolist(), strict=True):
            self.counts[guess] += 1
            self.seen.add(guess)
            self.ledger.by_class.setdefault(truth, []).append(loss.item())
        self.ledger.totals += logits.detach().sum(0)
        self.stats["loss"] += loss.detach()
        self.stats["nested"]["n"] += 1
        return loss


class NumpyConfusion(TupleBatch):
    """A confusion matrix in numpy, counted in place."""

    def __init__(self) -> None:
        super().__init__()
        self.confusion = np.zeros((CLASSES, CLASSES), dtype=np.int64)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        np.add.at(self.confusion, (y.numpy(), logits.argmax(1).numpy()), 1)
        return F.cross_entropy(logits, y)


class TupleOfTensors(TupleBatch):
    """Running sums in a tuple of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = (torch.zeros(1), torch.zeros(1))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.sums[0].add_(loss.detach())
        self.sums[1].add_(1)
        return loss


class Slotted(TupleBatch):
    """A meter without ``__dict__``."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = SlottedMeter()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.meter.total += loss.item()
        self.meter.count += 1
        return loss


class HoldsIterator(TupleBatch):
    """Semi-supervised: draws unlabelled batches from an iterator of its own."""

    def on_train_epoch_start(self):
        self.unlabelled = iter([torch.full((2, 1, 8, 8), i / 8) for i in range(8)])

    def training_step(self, batch, batch_idx):
        certainty = self(next(self.unlabelled)).softmax(1).amax(1).mean()
        return super().training_step(batch, batch_idx) - 0.1 * certainty


class LazyBuffer(TupleBatch):
    """Its first and only buffer comes into being with the first training batch."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        if not hasattr(self, "prior"):
            self.register_buffer("prior", logits.detach().mean(0))
            self.first_batch = x
        return F.cross_entropy(logits - self.prior, y)


class LazyValidation(TupleBatch):
    """A buffer and an attribute that come into being during validation, in inference mode."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        if not hasattr(self, "val_scale"):
            self.register_buffer("val_scale", logits.std().reshape(1))
            self.val_offset = logits.mean(0)
        self.log("val_loss", F.cross_entropy(self(x) * self.val_scale + self.val_offset, y))


class WritesToLogger(TupleBatch):
    """Talks to the experiment tracker directly."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.logger.experiment.add_scalar("direct/loss", loss.item(), self.global_step)
        self.logger.log_metrics({"direct/step": float(batch_idx)}, step=self.global_step)
        for logger in self.loggers:
            logger.experiment.add_scalar("direct/each", 1.0, self.global_step)
        return loss


class ReadsLogger(TupleBatch):
    """Asks the logger where it writes."""

    def training_step(self, batch, batch_idx):
        self.where = f"{self.logger.save_dir.rstrip('/')}/{self.logger.name}"
        return super().training_step(batch, batch_idx)


class OldSpectralNorm(TupleBatch):
    """Spectral normalisation by the older, hook-based function."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(convnet()[:4], torch.nn.utils.spectral_norm(nn.Linear(256, CLASSES)))


class Unified(unified.LightningModule):
    """Written against ``lightning.pytorch``."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.losses = nn.Sequential(convnet(), nn.Dropout(0.1)), []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)
