"""Input reconstruction in front of an unmodified module, judged by attacks that know of it."""

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
    AdaptiveAttack,
    BitDepth,
    DenoisingAutoencoder,
    InputReconstruction,
    MedianSmoothing,
    RobustEvaluation,
    Threat,
)

THREAT = Threat(eps=0.25)
NAIVE = PGD(steps=8, random_start=False)


class Trained(TupleBatch):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.fixture
def module():
    model, (x, y) = Trained(), image_columns(200)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model


def measured(module, *callbacks, stage="test"):
    trainer = make_trainer(pl.Trainer, *callbacks)
    getattr(trainer, stage)(module, loader(*image_columns(40, seed=1)), verbose=False)
    return {name.partition("/")[2]: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_apparent_and_adaptive_robustness_stand_side_by_side(module, stage):
    callback = InputReconstruction(BitDepth(3), THREAT, NAIVE)
    found = measured(module, callback, stage=stage)
    undefended, apparent, adaptive = (found[f"{n}/robust_acc"] for n in ("undefended", "apparent", "adaptive"))
    assert apparent > undefended + 0.3  # the gradient is gone, so the naive attack finds nothing
    assert adaptive < apparent - 0.3
    assert found["apparent_gain"] == pytest.approx(apparent - undefended, abs=1e-6)
    assert found["adaptive_gain"] == pytest.approx(adaptive - undefended, abs=1e-6)
    assert callback.gain is not None
    assert callback.gain.n == 40
    plain = measured(module, RobustEvaluation({"naive": NAIVE}, THREAT, checks=False, draws=1), stage=stage)
    assert undefended == plain["robust_acc"]
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("order", [1, -1])
def test_other_evaluations_attack_adaptively_too_and_get_their_attacks_back(module, order):
    evaluation = RobustEvaluation({"pgd": NAIVE}, THREAT, checks=False, draws=1)
    found = measured(module, *[InputReconstruction(BitDepth(3), THREAT, NAIVE), evaluation][::order])
    assert found["robust_acc"] <= found["robust_acc_pgd_adaptive"] < found["robust_acc_pgd"]
    assert found["robust_acc"] == found["adaptive/robust_acc"]
    assert evaluation.attacks == {"pgd": NAIVE}


def test_the_users_own_metrics_are_those_of_the_defended_module(module):
    class Outputs(pl.Callback):
        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            self.out = pl_module(batch[0])

    outputs, (x, _) = Outputs(), image_columns(8, seed=1)
    callback = InputReconstruction(BitDepth(1), THREAT, NAIVE, limit_batches=1)
    make_trainer(pl.Trainer, callback, outputs).test(module, loader(x, torch.zeros(8).long()), verbose=False)
    torch.testing.assert_close(outputs.out, module(x.round()))
    with callback.serving(module):
        torch.testing.assert_close(module(x), module.net(x.round()))
    torch.testing.assert_close(module(x), module.net(x))


def trained_with(*callbacks, **settings):
    model = Trained()
    torch.manual_seed(1)
    trainer = make_trainer(pl.Trainer, *callbacks, max_epochs=2, **settings)
    trainer.fit(model, loader(*image_columns(40), shuffle=True), loader(*image_columns(8, seed=1)))
    return model, trainer


def test_at_inference_only_training_is_what_it_is_without_and_otherwise_it_is_not():
    plain, _ = trained_with()
    for when, same in (("inference", True), ("always", False)):
        model, _ = trained_with(InputReconstruction(BitDepth(1), THREAT, NAIVE, when=when))
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert torch.equal(model.net[1].weight, plain.net[1].weight) is same
        assert not model._forward_pre_hooks


def test_an_autoencoder_learns_beside_the_module_and_its_weights_travel_with_the_checkpoint(tmp_path):
    def autoencoder():
        torch.manual_seed(7)
        return DenoisingAutoencoder(width=4, noise=0.2, noisy=True)

    learned = autoencoder()
    callback = InputReconstruction(learned, THREAT, PGD(steps=2), samples=2, lr=0.05)
    x = image_columns(40)[0]
    fixed = torch.Generator().manual_seed(0).get_state()

    def loss(net):
        g = torch.Generator()
        g.set_state(fixed)
        return float(net.learning_loss(x, g))

    before = loss(learned)
    model, trainer = trained_with(callback)
    assert loss(learned) < 0.9 * before
    assert all(p.grad is None for p in learned.parameters())
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    assert not any("layers" in key for key in model.state_dict())
    again = autoencoder()
    resumed = InputReconstruction(again, THREAT, PGD(steps=2), samples=2, lr=0.05)
    trainer = make_trainer(pl.Trainer, resumed, max_epochs=2)
    trainer.fit(Trained(), loader(*image_columns(40)), ckpt_path=tmp_path / "net.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(learned.parameters(), again.parameters(), strict=True))


def test_a_defence_that_draws_is_attacked_on_the_average():
    adapted = InputReconstruction(DenoisingAutoencoder(noisy=True), THREAT, samples=3).adapt(NAIVE)
    assert isinstance(adapted, AdaptiveAttack)
    assert adapted.passes == 3 * 2 * NAIVE.passes
    assert "EOT" in str(adapted)
    assert "EOT" not in str(InputReconstruction(BitDepth(), THREAT).adapt(NAIVE))


def test_reconstruction_is_in_pixels_whatever_the_normalisation(module):
    threat = Threat(eps=0.12, mean=0.5, std=0.25)
    callback = InputReconstruction(BitDepth(1), threat, NAIVE)
    x = image_columns(8)[0]
    with callback.serving(module):
        torch.testing.assert_close(module(threat.from_pixels(x)), module.net(threat.from_pixels(x.round())))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: InputReconstruction(BitDepth(), THREAT, when="never"), "input_reconstruction.when must be one of"),
        (lambda: InputReconstruction(BitDepth(), THREAT, lr=0), "input_reconstruction.lr must be > 0"),
        (lambda: InputReconstruction(BitDepth(), THREAT, samples=0), "input_reconstruction.samples"),
        (
            lambda: measured(Trained(), *[InputReconstruction(BitDepth(), THREAT, NAIVE) for _ in range(2)]),
            "two InputReconstruction callbacks",
        ),
        (
            lambda: measured(Trained(), InputReconstruction(BitDepth(), THREAT, NAIVE, module="head")),
            "module='head' is no submodule of Trained; its children are: net",
        ),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_step_that_does_not_call_the_module_is_found():
    class Inner(Trained):
        def test_step(self, batch, batch_idx):
            self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    with pytest.raises(ValueError, match="which the step does not call"):
        measured(Inner(), InputReconstruction(BitDepth(), THREAT, NAIVE))
    found = measured(Inner(), InputReconstruction(MedianSmoothing(), THREAT, NAIVE, module="net"))
    assert "adaptive_gain" in found


@pytest.mark.parametrize("name", ["reconstruction", "threat", "attack"])
def test_wrong_kinds_are_named(name):
    with pytest.raises(TypeError, match=f"input_reconstruction.{name} must be"):
        InputReconstruction(**({"reconstruction": BitDepth(), "threat": THREAT} | {name: 3}))
