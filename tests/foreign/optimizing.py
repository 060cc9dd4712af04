"""Modules by third parties that have a say in optimization, or in what the step returns."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch, convnet
from torch import nn


class GAN(pl.LightningModule):
    """Two optimizers, manual optimization; the classic example of the framework's own documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, z):
        return self.generator(z)

    def training_step(self, batch):
        real, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(len(real), 4, device=self.device)
        one, zero = torch.ones(len(real), 1, device=self.device), torch.zeros(len(real), 1, device=self.device)
        self.toggle_optimizer(optimizer_g)
        g_loss = F.binary_cross_entropy_with_logits(self.discriminator(self(z)), one)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)
        self.toggle_optimizer(optimizer_d)
        d_loss = F.binary_cross_entropy_with_logits(self.discriminator(real), one)
        d_loss = (d_loss + F.binary_cross_entropy_with_logits(self.discriminator(self(z).detach()), zero)) / 2
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)

    def validation_step(self, batch, batch_idx):
        self.log("val_score", self.discriminator(batch[0]).mean())

    test_step = validation_step

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.9)),
            torch.optim.Adam(self.discriminator.parameters(), lr=0.01, betas=(0.5, 0.9)),
        )


class ManualAccumulation(TupleBatch):
    """One optimizer, gradients added up over two batches by hand, clipped, and a schedule stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.updates = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = F.cross_entropy(self(x), y) / 2
        self.manual_backward(loss)
        if (batch_idx + 1) % 2 == 0:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            self.updates += 1
        self.log("train_loss", loss)
        self.log("lr", scheduler.get_last_lr()[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]


class ManualClosure(TupleBatch):
    """Manual optimization with a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()

        def closure():
            loss = F.cross_entropy(self(x), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        with optimizer.toggle_model():
            optimizer.step(closure=closure)


class ManualSkips(TupleBatch):
    """Manual optimization that leaves out every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        if batch_idx % 2:
            return
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(x), y))
        optimizer.step()


class SecondOrder(TupleBatch):
    """An optimizer that calls its closure several times a step."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.evaluations = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 0

    def training_step(self, batch, batch_idx):
        self.evaluations += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


class ReturnsDict(TupleBatch):
    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return {"preds": logits.detach().argmax(1), "loss": F.cross_entropy(logits, y), "note": "kept"}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert outputs["note"] == "kept"
        self.log("acc", (outputs["preds"] == batch[1]).float().mean())


class SkipsBatches(TupleBatch):
    """Returns None for every second batch."""

    def training_step(self, batch, batch_idx):
        if batch_idx % 2:
            self.log("skipped", 1.0)
            return None
        return super().training_step(batch, batch_idx)


class ClipsItsWeights(TupleBatch):
    """A Wasserstein critic's habit: weights are clamped inside the step, before the forward pass."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for p in self.net.parameters():
                p.clamp_(-0.2, 0.2)
        return super().training_step(batch, batch_idx)


class GroupedSchedule(TupleBatch):
    """Two parameter groups, a scheduler by step, and a hook around the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norms = convnet(), []

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(float(sum(p.grad.norm() for p in self.parameters() if p.grad is not None)))

    def configure_optimizers(self):
        body, head = self.net[:4].parameters(), self.net[4].parameters()
        optimizer = torch.optim.AdamW([{"params": body, "lr": 1e-3}, {"params": head, "lr": 1e-2}])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-3, 1e-2], total_steps=30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
