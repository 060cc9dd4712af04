"""Losses of single examples through steps that were not written for it."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from foreign.cases import CASES
from foreign.runs import assert_same, fit, make_trainer, portrait
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from robust_train.callbacks._layout import Places
from robust_train.callbacks._losses import LossReader
from robust_train.callbacks._references import copy_for_audit

QUICK = [name for name in CASES if name not in ("compiled_inside", "holds_iterator")]


class Net(pl.LightningModule):
    """A classifier with dropout and batch normalisation, whose loss ``reduction`` says."""

    def __init__(self, smoothing: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.smoothing, self.reduction = smoothing, reduction

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = cross_entropy(logits, y, reduction=self.reduction, label_smoothing=self.smoothing)
        if self.reduction == "none":  # of the batch, not of its examples
            loss = loss.logsumexp(0)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(n: int = 50) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator))


def trained(module: pl.LightningModule):
    trainer = make_trainer(pl.Trainer, max_epochs=2)
    trainer.fit(module, DataLoader(data(), batch_size=10))
    return trainer


def reader(module: pl.LightningModule) -> LossReader:
    trainer = trained(module)
    collate = DataLoader(data()).collate_fn
    return LossReader(trainer, copy_for_audit(trainer, module), collate, Places())


def expected(module: pl.LightningModule, smoothing: float = 0.0) -> np.ndarray:
    x, y = data().tensors
    with torch.no_grad():
        net = module.net.eval()  # type: ignore[union-attr]
        return cross_entropy(net(x), y, reduction="none", label_smoothing=smoothing).double().numpy()


def test_a_plain_classifier_is_read_in_batches_and_gives_its_own_losses():
    module = Net()
    read = reader(module)
    way = read.find_way(data())
    assert way.batched
    assert way.additive
    assert way.seconds_batched is not None
    assert way.seconds_batched < way.seconds
    np.testing.assert_allclose(read.losses(data(), way), expected(module), rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_no_plain_cross_entropy_is_read_one_example_at_a_time():
    module = Net(smoothing=0.2)
    read = reader(module)
    way = read.find_way(data())
    assert not way.batched
    assert way.additive
    np.testing.assert_allclose(read.losses(data(), way), expected(module, 0.2), rtol=1e-5, atol=1e-6)


def test_a_sum_over_the_batch_is_a_loss_of_examples_too():
    module = Net(reduction="sum")
    read = reader(module)
    way = read.find_way(data())
    assert way.additive
    np.testing.assert_allclose(read.losses(data(), way), expected(module), rtol=1e-5, atol=1e-6)


def test_a_loss_of_the_batch_as_a_whole_is_noticed():
    assert not reader(Net(reduction="none")).find_way(data()).additive


def test_probabilities_are_the_models_own():
    module = Net()
    read = reader(module)
    answers, labels = read.log_probabilities(data(), read.find_way(data()))
    x, y = data().tensors
    assert torch.equal(labels, y)
    with torch.no_grad():
        assert torch.allclose(answers.float(), module.net.eval()(x).log_softmax(1), atol=1e-5)


def test_augmentation_is_the_same_in_every_reading():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, i):
            x, y = data()[i]
            return x + torch.randn(6), y

    module = Net()
    read = reader(module)
    way = read.find_way(Noisy())
    before = torch.get_rng_state()
    assert (read.losses(Noisy(), way) == read.losses(Noisy(), way)).all()
    assert torch.equal(torch.get_rng_state(), before)


def test_losses_that_are_not_finite_are_refused():
    module = Net()
    trainer = trained(module)
    nn.init.constant_(module.net[0].weight, float("nan"))  # type: ignore[index]
    read = LossReader(trainer, copy_for_audit(trainer, module), DataLoader(data()).collate_fn, Places())
    with pytest.raises(ValueError, match="not finite"):
        read.find_way(data())


def test_a_step_without_a_loss_is_refused():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if len(batch[0]) < 10 else super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="gives no loss for a batch of one example"):
        reader(Skips()).find_way(data())


@pytest.mark.parametrize("name", QUICK)
def test_foreign_steps_are_read_and_left_as_they_were(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = CASES[name]
    done = fit(case, max_epochs=1)
    trainer, module = done.trainer, done.module
    loader = case.data().get("train_dataloaders") or case.data()["datamodule"].train_dataloader()
    before = portrait(module)
    places = Places(inputs=case.where.get("inputs"), logits=case.where.get("logits"))
    read = LossReader(trainer, copy_for_audit(trainer, module), loader.collate_fn, places)
    way = read.find_way(loader.dataset)
    losses = read.losses(loader.dataset, way)
    assert losses.shape == (len(loader.dataset),)
    assert np.isfinite(losses).all()
    assert (losses == read.losses(loader.dataset, way)).all()
    assert_same(before, portrait(module))
