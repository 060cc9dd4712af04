"""Certified training and verified accuracy in an unmodified Lightning run."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign.batches import DictBatch, TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import make_trainer
from torch import nn

from robust_train import (
    CROWNIBP,
    DPSGD,
    IBP,
    PGD,
    AdversarialTraining,
    CertifiedEvaluation,
    CertifiedTraining,
    RobustEvaluation,
    Threat,
)
from robust_train.evasion.certified.verifier import verified

THREAT = Threat(eps=0.05)


class Plain(TupleBatch):
    def __init__(self, norm: bool = True) -> None:
        torch.manual_seed(0)
        super().__init__()
        if not norm:
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fitted(module, *callbacks, epochs=6, **settings):
    torch.manual_seed(0)
    trainer = make_trainer(pl.Trainer, *callbacks, max_epochs=epochs, **settings)
    trainer.fit(module, loader(*image_columns(60)), loader(*image_columns(30, seed=1)))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def measured(module, *callbacks, data=None, stage="validate"):
    trainer = make_trainer(pl.Trainer, *callbacks)
    getattr(trainer, stage)(module, loader(*image_columns(60, seed=1)) if data is None else data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("verifier", [IBP(), CROWNIBP(last_beta=0.5)])
def test_what_is_proved_grows_and_never_exceeds_what_attacks_leave(verifier):
    found, threat = {}, Threat(eps=0.15)
    for name, callbacks in {"plain": (), "certified": (CertifiedTraining(threat, verifier, ramp=0.4),)}.items():
        module = Plain()
        fitted(module, *callbacks, epochs=8)
        assert "training_step" not in module.__dict__
        found[name] = measured(module, CertifiedEvaluation(threat), RobustEvaluation(PGD(steps=10), threat))
        assert found[name]["val/verified_acc"] <= found[name]["val/robust_acc"] <= found[name]["val/clean_acc"]
    assert found["certified"]["val/verified_acc"] > found["plain"]["val/verified_acc"] + 0.3


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_verified_accuracy_is_what_the_function_says_and_without_eps_the_clean_one(stage):
    module, (x, y) = Plain(), image_columns(60, seed=1)
    fitted(module, CertifiedTraining(THREAT), epochs=3)
    module.eval()
    prefix = "val" if stage == "validate" else stage
    logged = measured(module, CertifiedEvaluation(THREAT, IBP()), CertifiedEvaluation(THREAT, name="x"), stage=stage)
    for name, verifier in (("verified_acc", IBP()), ("x/verified_acc", CROWNIBP())):
        want = verified(module, x, y, THREAT, verifier).float().mean()
        assert logged[f"{prefix}/{name}"] == pytest.approx(float(want), abs=1e-6)
    clean = measured(module, CertifiedEvaluation(Threat(eps=0)), RobustEvaluation(PGD(steps=1), Threat(eps=0)))
    assert clean["val/verified_acc"] == clean["val/clean_acc"]


def test_what_the_step_does_before_the_network_is_bounded_too():
    class Scaling(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(((batch[0] - 0.5) / 0.25, batch[1]), batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step(((batch[0] - 0.5) / 0.25, batch[1]), batch_idx)

    module, (x, y) = Scaling(), image_columns(60, seed=1)
    fitted(module, CertifiedTraining(THREAT), epochs=3)
    module.eval()

    class Whole(nn.Module):
        def forward(self, x):
            return module((x - 0.5) / 0.25)

    logged = measured(module, CertifiedEvaluation(THREAT, IBP()))
    want = verified(Whole(), x, y, THREAT, IBP()).float().mean()
    assert logged["val/verified_acc"] == pytest.approx(float(want), abs=1e-6)


def test_with_eps_0_the_weights_are_those_of_plain_training_up_to_rounding():
    plain, null = Plain(norm=False), Plain(norm=False)
    fitted(plain, epochs=2)
    found = fitted(null, CertifiedTraining(Threat(eps=0), warmup=0, ramp=0), epochs=2)
    assert found["train/certified_loss"] == pytest.approx(found["train_loss_step"], rel=1e-4)
    for a, b in zip(plain.parameters(), null.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_evaluating_changes_nothing_in_training():
    plain, watched = Plain(), Plain()
    fitted(plain, epochs=2)
    fitted(watched, CertifiedEvaluation(THREAT), epochs=2)
    for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_batches_of_dicts_and_manual_optimization():
    module = DictBatch()
    make_trainer(pl.Trainer, CertifiedTraining(THREAT, warmup=0, ramp=0), CertifiedEvaluation(THREAT)).fit(
        module, **CASES["dict"].data()
    )

    class Manual(Plain):
        def __init__(self):
            super().__init__(norm=False)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    module = Manual()
    fitted(module, CertifiedTraining(THREAT), epochs=10)
    assert measured(module, CertifiedEvaluation(THREAT))["val/verified_acc"] > 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_compiled_is_bounded_as_it_was_written(whole):
    module, same = Plain(), Plain()
    if whole:
        module.net.compile(backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    x, y = image_columns(30, seed=1)
    callback = CertifiedEvaluation(THREAT, IBP())
    found = measured(module, callback, data=loader(x, y))
    want = verified(same.eval(), x, y, THREAT, IBP()).float().mean()
    assert found["val/verified_acc"] == pytest.approx(float(want), abs=1e-6)
    fitted(module, CertifiedTraining(THREAT), epochs=1)


def test_the_box_grows_over_the_run():
    schedule = CertifiedTraining(THREAT, clean_weight=0.4, warmup=0.2, ramp=0.4).schedule
    assert schedule(0.1) == (0.0, 1.0)
    assert schedule(0.4) == pytest.approx((0.5, 0.7))
    assert schedule(0.7) == pytest.approx((1.0, 0.4))
    assert CertifiedTraining(THREAT, warmup=0, ramp=0).schedule(0.0) == (1.0, 0.5)
    callback = CertifiedTraining(THREAT)
    seen: list[float] = []
    grow = callback.schedule
    callback.schedule = lambda progress: (seen.append(progress), grow(progress))[1]  # type: ignore[method-assign]
    fitted(Plain(), callback, epochs=2)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert 0.9 < seen[-1] < 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CertifiedTraining(THREAT, clean_weight=1), r"certified_training.clean_weight must be in \[0, 1\)"),
        (lambda: CertifiedTraining(THREAT, warmup=0.5, ramp=0.5), "their sum must be below 1"),
        (lambda: CertifiedTraining(THREAT, ramp="half"), "certified_training.ramp must be in"),
        (lambda: CertifiedTraining(THREAT, logits=""), "certified_training.logits"),
        (lambda: CertifiedEvaluation(THREAT, every_n_epochs=0), "certified_evaluation.every_n_epochs"),
        (lambda: fitted(Plain(), CertifiedTraining(THREAT), epochs=-1), "max_epochs or max_steps"),
        (
            lambda: fitted(Plain(), CertifiedTraining(THREAT), AdversarialTraining(PGD(), THREAT)),
            "CertifiedTraining and AdversarialTraining in one Trainer",
        ),
        (
            lambda: fitted(Plain(norm=False), CertifiedTraining(THREAT), DPSGD(noise_multiplier=1.0)),
            "CertifiedTraining and DPSGD in one Trainer",
        ),
        (lambda: fitted(Plain(), CertifiedTraining(Threat(low=0.5))), "threat.mean"),
        (
            lambda: measured(Plain(), CertifiedEvaluation(THREAT), CertifiedEvaluation(THREAT)),
            "two CertifiedEvaluation callbacks",
        ),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("kind", ["threat", "verifier"])
@pytest.mark.parametrize("callback", [CertifiedTraining, CertifiedEvaluation])
def test_wrong_kinds_are_named(callback, kind):
    with pytest.raises(TypeError, match=f"{kind} must be a robust_train {kind.capitalize()}"):
        callback(**({"threat": THREAT} | {kind: 3}))


def test_a_layer_that_cannot_be_bounded_is_named_and_nothing_is_left_behind():
    module = Plain()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="gelu: it is not monotone; use ReLU"):
        fitted(module, CertifiedTraining(THREAT, warmup=0))
    assert "training_step" not in module.__dict__
    with pytest.raises(ValueError, match="gelu"):
        measured(module, CertifiedEvaluation(THREAT))


def test_a_task_without_classes_is_refused():
    case = CASES["regression"]
    with pytest.raises(ValueError, match="needs logits and class labels"):
        make_trainer(pl.Trainer, CertifiedTraining(case.ball(0.1), warmup=0)).fit(case.module(), **case.data())
