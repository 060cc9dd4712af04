"""Attacks that look into the model or govern its randomness, and MART and ALP, on a LightningModule's own step."""

from __future__ import annotations

from typing import ClassVar

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import fit, make_trainer
from torch import nn

from robust_train import (
    ALP,
    BPDA,
    EOT,
    FGSM,
    FMN,
    MART,
    MIFGSM,
    PGD,
    AdversarialTraining,
    Patch,
    RobustEvaluation,
    SparseRS,
    Spatial,
    Threat,
)
from robust_train.evasion.attacks.hop_skip_jump import HopSkipJump
from robust_train.evasion.attacks.transfer import Transfer

THREAT = Threat(eps=0.1)


class Quantise(nn.Module):
    def forward(self, x):
        return torch.round(x * 8) / 8


class Noise(nn.Module):
    """Remembers what it drew."""

    def __init__(self):
        super().__init__()
        self.drawn: list[float] = []
        DRAWN.append([])

    def forward(self, x):
        noise = torch.randn_like(x)
        DRAWN[-1].append(float(noise.sum()))
        return x + 0.1 * noise


DRAWN: list[list[float]] = []


class Hidden(TupleBatch):
    """A linear model behind a layer, half trained."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 3))
        x, y = image_columns(60, seed=5)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(self(x), y).backward()
            optimizer.step()
        self.zero_grad()


def evaluated(layer, **attacks):
    callback = RobustEvaluation(attacks, THREAT)
    trainer = make_trainer(pl.Trainer, callback)
    trainer.validate(Hidden(layer), loader(*image_columns(60, seed=1)), verbose=False)
    return {key.removeprefix("val/"): float(value) for key, value in trainer.callback_metrics.items()}


def test_bpda_goes_past_a_rounding_layer_of_the_users_module():
    found = evaluated(
        Quantise(), pgd=PGD(steps=10), found=BPDA(PGD(steps=10)), named=BPDA(PGD(steps=10), modules=["net.0"])
    )
    assert found["robust_acc_found"] < found["robust_acc_pgd"] - 0.2
    assert found["robust_acc_named"] == found["robust_acc_found"]


def test_eot_sees_new_draws_of_the_users_module_in_every_pass():
    evaluated(Noise(), eot=EOT(FGSM(), samples=6))
    eot = len(set(DRAWN[-1]))
    evaluated(Noise(), fgsm=FGSM())
    assert eot >= len(set(DRAWN[-1])) + 5  # the sandbox alone shows every pass the draws of the real one


@pytest.mark.parametrize(
    "attack",
    [EOT(PGD(steps=2), samples=2), BPDA(PGD(steps=2)), MIFGSM(steps=2, diversity=0.5, kernel=3), FMN(steps=3)],
    ids=lambda a: type(a).__name__,
)
def test_they_train_too(attack):
    result = fit(CASES["tuple"], AdversarialTraining(attack, THREAT), max_epochs=1)
    assert "train/adv_loss" in result.trainer.callback_metrics


def test_black_box_attacks_judge_the_users_module():
    surrogate = Hidden(nn.Identity()).net
    found = evaluated(nn.Identity(), jump=HopSkipJump(queries=200), transfer=Transfer(surrogate, PGD(steps=5)))
    assert found["robust_acc_jump"] < found["clean_acc"]
    assert found["robust_acc_transfer"] < found["clean_acc"]


def test_attacks_with_limits_of_their_own_judge_and_train_and_are_named():
    said, before = [], THREAT.describe()

    class Telling(AdversarialTraining):
        def announce(self, trainer, text):
            said.append(text)

    found = evaluated(nn.Identity(), spatial=Spatial(translation=1), patch=Patch(size=3, steps=5))
    assert found["robust_acc_spatial"] < found["clean_acc"]
    assert found["robust_acc_patch"] < found["clean_acc"]
    for attack in (Spatial(tries=3), Patch(size=2, steps=2)):
        fit(CASES["tuple"], Telling(attack, THREAT), max_epochs=1)
        assert f"within the {before}; {type(attack).__name__} instead: {attack.limits}; objective" in said.pop()


def test_a_few_pixels_judge_the_users_module():
    evaluation = RobustEvaluation(SparseRS(queries=100), Threat("l0", 6))
    trainer = make_trainer(pl.Trainer, evaluation)
    trainer.validate(Hidden(nn.Identity()), loader(*image_columns(60, seed=1)), verbose=False)
    assert trainer.callback_metrics["val/robust_acc"] < trainer.callback_metrics["val/clean_acc"] - 0.2
    with pytest.raises(ValueError, match="PGD has no version for threat.norm=l0: use SparseRS"):
        AdversarialTraining(PGD(), Threat("l0", 6))


# --- objectives -------------------------------------------------------------------------------------------------------


class Gradients:
    """Hands out the gradients of the first step."""

    def __init__(self, name, *callbacks):
        case, found = CASES[name], []

        class Watched(case.module):  # type: ignore[misc,name-defined]
            def on_before_optimizer_step(self, optimizer):
                found.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

        torch.manual_seed(0)
        fit(case, *callbacks, module=Watched(), max_steps=1, limit_val_batches=0)
        self.values = found[0]


@pytest.mark.parametrize("name", ["tuple", "tabular_binary", "segmentation", "encoder_and_head"])
def test_without_a_radius_alp_has_the_plain_gradient_and_marts_divergence_none(name):
    case = CASES[name]

    def gradients(objective):
        return Gradients(name, AdversarialTraining(PGD(steps=2), case.ball(0), objective, **case.where)).values

    plain = Gradients(name).values
    for a, b in zip(plain, gradients(ALP()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(gradients(MART(beta=0)), gradients(MART(beta=5)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", [MART(beta=3), ALP(weight=2)], ids=["mart", "alp"])
def test_the_loss_is_the_papers_on_the_users_own_step(objective):
    class Spy(Hidden):
        seen: ClassVar[list[torch.Tensor]] = []  # of the class: the callback takes it for nobody's state

        def training_step(self, batch, batch_idx):
            Spy.seen.append(batch[0].detach().clone())
            return super().training_step(batch, batch_idx)

    module = Spy(nn.Identity())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    x, y = image_columns(n=8)
    callback = AdversarialTraining(PGD(steps=2), THREAT, objective)
    data = {"train_dataloaders": loader(x, y)}
    result = fit(CASES["tuple"], callback, module=module, data=data, max_epochs=1)
    x_adv = next(b for b in reversed(Spy.seen) if not torch.equal(b, x))
    with torch.no_grad():
        z, w = module(x), module(x_adv)
        own, p, q = F.cross_entropy(w, y), z.softmax(1), w.softmax(1)
        if isinstance(objective, MART):
            runner_up = q.scatter(1, y[:, None], 0).amax(1)
            kl = (p * (p / q).log()).sum(1) * (1 - p.gather(1, y[:, None]).squeeze(1))
            want = own + (3 * kl - (1 - runner_up).log()).mean()
        else:
            want = 0.5 * own + 0.5 * F.cross_entropy(z, y) + 2 * (z - w).square().mean()
    torch.testing.assert_close(result.trainer.callback_metrics["train/adv_loss"], want)
