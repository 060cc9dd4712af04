"""Defensive distillation: what it hides, and that the adaptive attack finds it."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch
from foreign.data import image_columns, loader
from foreign.runs import make_trainer
from torch import nn

from robust_train import (
    PGD,
    AdversarialTraining,
    ClassifierVictim,
    DefensiveDistillation,
    RobustEvaluation,
    TemperedAttack,
    Threat,
)
from robust_train.evasion.distillation import adapted_to_distillation, distillation_gain, tempered_loss

THREAT = Threat(eps=0.3)
NAIVE = PGD(steps=8, random_start=False)


class Student(TupleBatch):
    def __init__(self, width: int = 16) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 3))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def fitted(callback, *others, epochs=12, module=None, **settings):
    module = Student() if module is None else module
    torch.manual_seed(1)
    trainer = make_trainer(pl.Trainer, callback, *others, max_epochs=epochs, **settings)
    trainer.fit(module, loader(*image_columns(80), shuffle=True), loader(*image_columns(40, seed=1)))
    return module, trainer


def test_the_loss_is_the_cross_entropy_at_the_temperature_with_gradients_of_the_usual_size():
    logits, labels = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    p = (logits / 5).softmax(1)
    want = 5 * -p[torch.arange(6), labels].log().mean()
    torch.testing.assert_close(tempered_loss(logits, labels, 5.0), want)
    soft = F.one_hot(labels, 4).double()
    torch.testing.assert_close(tempered_loss(logits, soft, 5.0), want)
    torch.testing.assert_close(tempered_loss(logits, labels, 1.0), F.cross_entropy(logits, labels))


def test_saturated_logits_hide_the_gradient_from_the_naive_attack_only():
    g = torch.Generator().manual_seed(0)
    x, teacher = torch.rand(60, 8, generator=g), nn.Linear(8, 3)
    labels = teacher(x).argmax(1)

    class Loud(nn.Module):
        def forward(self, x):
            return 3000 * teacher(x)

    found = distillation_gain(teacher, Loud(), x, labels, Threat(eps=0.2), PGD(steps=10), temperature=3000.0)
    assert found.apparent_gain > 0.2
    assert found.adaptive_gain == pytest.approx(0, abs=0.05)
    victim = ClassifierVictim(Loud(), labels)
    plain = PGD(steps=10)(ClassifierVictim(teacher, labels), x, Threat(eps=0.2), torch.Generator().manual_seed(0))
    seen = TemperedAttack(PGD(steps=10), 3000.0)(victim, x, Threat(eps=0.2), torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain, seen)  # the same attack as on the model before its logits were stretched


def test_the_student_learns_the_teachers_predictions_and_gains_little(tmp_path):
    callback = DefensiveDistillation(THREAT, temperature=30.0, attack=NAIVE, every_n_epochs=99)
    outer = RobustEvaluation({"pgd": NAIVE}, THREAT, every_n_epochs=99, checks=False, draws=1)
    module, trainer = fitted(callback, outer)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/adaptive/robust_acc"] <= metrics["val/apparent/robust_acc"]
    assert metrics["val/adaptive_gain"] < 0.25
    assert metrics["val/robust_acc"] <= metrics["val/robust_acc_pgd_adaptive"] + 1e-6
    assert metrics["val/clean_acc"] > 0.9
    assert outer.attacks == {"pgd": NAIVE}
    assert "training_step" not in module.__dict__
    assert callback.weights is not None
    assert callback.weights.keys() == module.state_dict().keys()
    x = image_columns(40, seed=1)[0]
    module.eval()
    with torch.no_grad():
        own = (module(x) / 30).softmax(1)
        with callback.without(module):
            soft = (module(x) / 30).softmax(1)
        assert torch.equal((module(x) / 30).softmax(1), own)
    assert 0.4 < float(soft.amax(1).mean()) < 0.9999  # soft labels, learned at the temperature
    assert float((own - soft).abs().mean()) < 0.15
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    kept = torch.load(tmp_path / "net.ckpt", weights_only=True)
    (state,) = (s for name, s in kept["callbacks"].items() if "Distillation" in name)
    assert all(torch.equal(state["teacher"][name], value) for name, value in callback.weights.items())


def test_a_teacher_may_come_from_a_checkpoint(tmp_path):
    teacher = Student()
    torch.save({"state_dict": teacher.state_dict()}, tmp_path / "teacher.ckpt")
    callback = DefensiveDistillation(THREAT, teacher=str(tmp_path / "teacher.ckpt"), attack=NAIVE)
    fitted(callback, epochs=1)
    assert callback.weights is not None
    assert all(torch.equal(callback.weights[name], value) for name, value in teacher.state_dict().items())
    torch.save({"state_dict": Student(8).state_dict()}, tmp_path / "other.ckpt")
    for name, reason in (("other.ckpt", "other names or shapes"), ("none.ckpt", "No such file")):
        with pytest.raises(ValueError, match=f"teacher=.*{name}' does not fit Student.*{reason}"):
            fitted(DefensiveDistillation(THREAT, teacher=str(tmp_path / name)), epochs=1)


def test_the_adaptive_attack_is_three_attacks():
    attack = adapted_to_distillation(NAIVE, 20.0)
    assert attack.members[0] == NAIVE
    assert attack.members[1] == TemperedAttack(NAIVE, 20.0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: DefensiveDistillation(THREAT, temperature=0.5),
            "temperature must be from 1 to",
        ),
        (lambda: DefensiveDistillation(THREAT, teacher=""), "defensive_distillation.teacher"),
        (lambda: TemperedAttack(NAIVE, "hot"), "tempered_attack.temperature must be from 1 to"),  # type: ignore[arg-type]
        (lambda: fitted(DefensiveDistillation(THREAT), epochs=-1), "name a checkpoint with teacher="),
        (
            lambda: fitted(DefensiveDistillation(THREAT), AdversarialTraining(NAIVE, THREAT)),
            "DefensiveDistillation and AdversarialTraining in one Trainer",
        ),
        (
            lambda: make_trainer(pl.Trainer, DefensiveDistillation(THREAT)).test(
                Student(), loader(*image_columns(8)), verbose=False
            ),
            "no teacher to compare with",
        ),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("name", ["threat", "attack"])
def test_wrong_kinds_are_named(name):
    with pytest.raises(TypeError, match=f"defensive_distillation.{name} must be"):
        DefensiveDistillation(**({"threat": THREAT} | {name: 3}))
