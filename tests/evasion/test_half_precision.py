"""Gradients that fp16 would lose are found and scaled."""

from __future__ import annotations

import copy
import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from digit_models import accuracy, digits, model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_train import PGD, AdversarialTraining, ClassifierVictim, Threat
from robust_train.evasion.gradients import LossScale
from robust_train.evasion.victim import Victim, input_gradient

THREAT = Threat(eps=0.15)


def sure(times: float) -> nn.Module:
    """The undefended model, surer of itself: its gradients are the smaller."""
    net = copy.deepcopy(model())
    net[-1].weight.data *= times
    net[-1].bias.data *= times
    return net


class Half(nn.Module):
    """A model that computes in fp16, and whose inputs and logits do not show it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).half()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.half()).float()


class Mean(ClassifierVictim):
    """Only the mean loss is known, as of a user's training step."""

    def loss(self, x: Tensor) -> Tensor:
        return super().loss(x).mean()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    x, y, _, _ = digits()
    return x[:512], y[:512]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of each example's gradients, however small, ``(B,)``."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-300)


def robust(net: nn.Module, victim: Victim, x: Tensor, y: Tensor) -> float:
    return accuracy(net, PGD(steps=5)(victim, x, THREAT, torch.Generator().manual_seed(0)), y)


@pytest.mark.parametrize("times", [2.0, 4.0])
def test_a_mean_over_many_examples_hides_no_gradient_in_fp16(times, batch):
    x, y = batch
    whole, half = sure(times), Half(sure(times))
    true = robust(whole, ClassifierVictim(whole, y), x, y)
    naive = Mean(half, y)
    naive.found_scale = LossScale(1.0, fixed=True)
    assert robust(half, naive, x, y) > true + 0.3
    assert abs(robust(half, Mean(half, y), x, y) - true) < 0.03
    assert abs(robust(half, ClassifierVictim(half, y), x, y) - true) < 0.03


def test_the_gradient_is_that_of_fp32(batch):
    x, y = batch
    whole, half = sure(2.0), Half(sure(2.0))
    want, _, _ = input_gradient(Mean(whole, y), x)
    naive = Mean(half, y)
    naive.found_scale = LossScale(1.0, fixed=True)
    lost = ~input_gradient(naive, x)[0].flatten(1).any(1)
    assert float(lost.float().mean()) > 0.2
    found, _, _ = input_gradient(Mean(half, y), x)
    alike = cosine(found, want)
    assert float(alike[want.flatten(1).any(1)].quantile(0.1)) > 0.95
    size = found.flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert 0.8 < float(size.median()) < 1.25


def test_inputs_and_losses_in_fp16_begin_with_a_larger_factor(batch):
    x, y = batch
    half = copy.deepcopy(sure(1.0)).half()
    victim = Mean(half, y)
    grad, _, _ = input_gradient(victim, x.half())
    assert victim.found_scale.value >= 2.0**10
    assert grad.dtype == torch.float32
    want, _, _ = input_gradient(Mean(sure(1.0), y), x)
    assert float(cosine(grad, want).median()) > 0.98


def test_a_factor_that_is_too_large_is_lowered_and_stays_so(batch):
    x, y = batch
    half, calls = sure(1.0).half(), []
    half.register_forward_hook(lambda *_: calls.append(1))
    victim = ClassifierVictim(half, y)
    victim.gradient_scale = 2.0**24
    grad, _, _ = input_gradient(victim, x.half())
    assert bool(grad.any())
    assert victim.found_scale.value < 2.0**24
    calls.clear()
    input_gradient(victim, x.half())
    part = victim.take(torch.arange(100))
    input_gradient(part, x[:100].half())
    assert part.found_scale is victim.found_scale
    assert len(calls) <= 4  # a second factor at most


def test_in_fp32_nothing_changes_and_nothing_is_asked_twice(batch):
    x, y = batch
    net, calls = model(), []
    hook = net.register_forward_hook(lambda *_: calls.append(1))
    victim = Mean(net, y)
    grad, _, _ = input_gradient(victim, x)
    hook.remove()
    assert len(calls) == 1
    assert victim.found_scale == LossScale(1.0, searched=True)
    inputs = x.clone().requires_grad_(True)
    assert torch.equal(grad, torch.autograd.grad(F.cross_entropy(net(inputs), y), inputs)[0])


def test_a_gradient_that_is_really_zero_is_looked_for_once():
    calls = []

    def flat(x):
        calls.append(1)
        return torch.stack([x.flatten(1).sum(1) * 0, x.flatten(1).sum(1) * 0], 1)

    victim = ClassifierVictim(flat, torch.zeros(3, dtype=torch.long))
    for _ in range(3):
        assert not input_gradient(victim, torch.rand(3, 4))[0].any()
    assert len(calls) == 3 + 1


@pytest.mark.parametrize("attacked", ["half", "whole"])
def test_a_training_step_of_512_examples_in_fp16_is_attacked_as_in_fp32(attacked, batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = batch
    net = (Half(sure(4.0)) if attacked == "half" else sure(4.0)).train()
    seen = []

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, _):
            seen.append(batch[0].detach().clone())
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = AdversarialTraining(PGD(steps=5), THREAT, seed=0)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(Module(), DataLoader(TensorDataset(x, y), batch_size=512))
    assert accuracy(net, seen[-1], y) < 0.3
    assert math.isclose(float((seen[-1] - x).abs().max()), 0.15, rel_tol=1e-5)
