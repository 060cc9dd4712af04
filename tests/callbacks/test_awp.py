"""Adversarial weight perturbation on unmodified modules, and against a loop that is written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import assert_same, fit, portrait
from torch import nn

from robust_train import AWP, FGSM, MART, PGD, PGDAT, TRADES, AdversarialTraining, ClassifierVictim
from robust_train.evasion.objectives.awp import weight_perturbations
from robust_train.evasion.weights import exchanged

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
KINDS = [
    "tuple",
    "dict",
    "nasty",
    "manual_accumulation",
    "manual_closure",
    "manual_skips",
    "second_order",
    "gan",
    "skips_batches",
    "checkpointed",
    "recurrent",
    "old_spectral_norm",
    "frozen_backbone",
    "momentum_teacher",
    "unified",
]
SETTINGS = {
    "accumulate": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
    "clip": {"gradient_clip_val": 0.5},
}


def training(case, objective, eps=0.1):
    return AdversarialTraining(PGD(steps=2), case.ball(eps), objective, **case.where)


def test_perturbations_have_the_papers_size_and_direction():
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 3, generator=g), torch.randn(5, 2, generator=g), torch.randn(2, 2, generator=g)]
    gradients = [torch.randn(4, 3, generator=g), 1e-30 * torch.randn(5, 2, generator=g), torch.zeros(2, 2)]
    moves = weight_perturbations(weights, gradients, 0.01)
    for w, grad, v in zip(weights[:2], gradients[:2], moves[:2], strict=True):
        assert float(v.norm()) == pytest.approx(0.01 * float(w.norm()), rel=1e-5)
        assert float(F.cosine_similarity(v.flatten(), (grad / grad.abs().max()).flatten(), 0)) == pytest.approx(
            1, abs=1e-5
        )
    assert not moves[2].any()
    assert weight_perturbations([weights[0].bfloat16()], [gradients[0]], 0.01)[0].dtype == torch.bfloat16
    broken = torch.full((4, 3), torch.nan)
    assert not weight_perturbations(weights[:1], [broken], 0.01)[0].any()


def test_exchanged_weights_come_back_as_the_same_objects():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.b.weight = self.a.weight
            self.rnn = nn.GRU(3, 3, batch_first=True)

        def forward(self, x):
            return self.rnn(self.norm(self.b(self.a(x)))[None])[0]

    net, x = Tied().eval(), torch.randn(5, 3)
    held = [*net.parameters(), *net.buffers()]
    clean = net(x)
    others = {t: t + 1 for t in held if t.is_floating_point()}
    with exchanged(net, others):
        assert not torch.allclose(net(x), clean)
        net(x).sum().backward()
    with pytest.raises(RuntimeError), exchanged(net, others):
        net(torch.zeros(5, 4))
    assert all(a is b for a, b in zip([*net.parameters(), *net.buffers()], held, strict=True))
    assert net.a.weight.grad is not None
    assert torch.equal(net(x), clean)


@pytest.mark.parametrize("clean_weight", [0.0, 0.5])
def test_a_step_is_the_one_written_out_by_hand(clean_weight):
    x, y = image_columns(n=8)
    module = TupleBatch()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.5)
    hand = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
    hand.load_state_dict(module.net.state_dict())
    case, objective = CASES["tuple"], PGDAT(clean_weight=clean_weight)
    data = {"train_dataloaders": loader(x, y)}
    callback = AdversarialTraining(FGSM(), case.ball(0.1), AWP(objective, gamma=0.05))
    fit(case, callback, module=module, data=data, max_epochs=1)

    x_adv = FGSM()(ClassifierVictim(hand, y), x, case.ball(0.1))

    def loss():
        return (1 - clean_weight) * F.cross_entropy(hand(x_adv), y) + clean_weight * F.cross_entropy(hand(x), y)

    matrices = [p for p in hand.parameters() if p.ndim > 1]
    old = [p.detach().clone() for p in matrices]
    gradients = torch.autograd.grad(loss(), matrices)
    with torch.no_grad():
        for p, g in zip(matrices, gradients, strict=True):
            p += 0.05 * g * p.norm() / g.norm()
    grads = torch.autograd.grad(loss(), list(hand.parameters()))
    with torch.no_grad():
        for p, w in zip(matrices, old, strict=True):
            p.copy_(w)
        for p, g in zip(hand.parameters(), grads, strict=True):
            p -= 0.5 * g
    for a, b in zip(module.net.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_gamma_zero_changes_nothing(name):
    case = CASES[name]
    alone, ours = fit(case, training(case, PGDAT())), fit(case, training(case, AWP(gamma=0)))
    assert_same(alone.trace, ours.trace)


@pytest.mark.parametrize("name", KINDS)
def test_perturbed_training_leaves_the_modules_own_weights_in_place(name):
    case = CASES[name]
    module = case.module()
    held = [*module.parameters()]
    ours = fit(case, training(case, AWP(gamma=0.05)), module=module)
    assert all(a is b for a, b in zip(module.parameters(), held, strict=True))
    alone = fit(case, training(case, PGDAT()))
    assert ours.trainer.global_step == alone.trainer.global_step
    assert portrait(dict(ours.module.state_dict())) != portrait(dict(alone.module.state_dict()))
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("settings", SETTINGS)
def test_other_trainers(settings):
    case = CASES["nasty"]
    nothing = fit(case, training(case, AWP(gamma=0)), **SETTINGS[settings])
    assert_same(fit(case, training(case, PGDAT()), **SETTINGS[settings]).trace, nothing.trace)
    moved = fit(case, training(case, AWP(gamma=0.05)), **SETTINGS[settings])
    assert portrait(dict(moved.module.state_dict())) != portrait(dict(nothing.module.state_dict()))


@pytest.mark.parametrize("inner", [TRADES(), MART()], ids=["trades", "mart"])
def test_other_objectives(inner):
    case = CASES["tuple"]
    ours = fit(case, training(case, AWP(inner, gamma=0.01)))
    alone, nothing = fit(case, training(case, inner)), fit(case, training(case, AWP(inner, gamma=0)))
    assert_same(alone.trace, nothing.trace)
    assert portrait(dict(ours.module.state_dict())) != portrait(dict(alone.module.state_dict()))


def test_checkpointed_activations_are_computed_again_with_the_perturbed_weights():
    def weights(checkpointed):
        torch.manual_seed(0)
        module = CASES["checkpointed"].module()
        module.net[1] = nn.Tanh()  # batch normalisation would count each batch twice
        if not checkpointed:
            module.training_step = lambda batch, batch_idx: F.cross_entropy(module.net(batch[0]), batch[1])
        fit(CASES["checkpointed"], training(CASES["checkpointed"], AWP(gamma=0.3)), module=module)
        return portrait(dict(module.state_dict()))

    assert_same(weights(True), weights(False))


def test_a_step_that_writes_into_its_weights_is_refused():
    case = CASES["clips_its_weights"]
    with pytest.raises(ValueError, match="writes into its own weights"):
        fit(case, training(case, AWP()))


def test_an_error_in_the_backward_pass_leaves_the_modules_own_weights_in_place():
    class Breaks(TupleBatch):
        def on_before_backward(self, loss):
            assert not isinstance(self.net[0].weight, nn.Parameter)
            raise RuntimeError("broke")

    module = Breaks()
    held = list(module.parameters())
    with pytest.raises(RuntimeError, match="broke"):
        fit(CASES["tuple"], training(CASES["tuple"], AWP()), module=module)
    assert all(a is b for a, b in zip(module.parameters(), held, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: AWP(gamma=-0.1), ValueError, r"awp.gamma must be in \[0, 1\), got -0.1"),
        (lambda: AWP(gamma="x"), ValueError, "awp.gamma"),
        (lambda: AWP(objective="trades"), TypeError, "awp.objective"),
        (lambda: AWP(AWP()), TypeError, "another robust_train Objective"),
    ],
)
def test_bad_settings_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()
