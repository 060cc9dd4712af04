"""Gradient alignment: its penalty and its second derivative, on plain functions and on unmodified modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns
from foreign.runs import assert_same, fit, portrait
from torch import nn

from robust_train import FGSM, PGDAT, AdversarialTraining, ClassifierVictim, GradAlign, Threat
from robust_train.evasion.objectives.grad_align import misalignment
from robust_train.evasion.randomness import generator_for

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
KINDS = ["tuple", "dict", "nasty", "manual_accumulation", "manual_closure", "skips_batches", "regression", "unified"]
SETTINGS = {
    "accumulate": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
    "clip": {"gradient_clip_val": 0.5},
}


def training(case, weight, eps=0.1):
    return AdversarialTraining(FGSM(), case.ball(eps), GradAlign(weight), **case.where)


def test_misalignment_is_one_minus_the_cosine_of_each_example():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1e-30, 0.0]], requires_grad=True)
    b = torch.tensor([[0.0, 2.0], [3.0, 3.0], [1.0, 0.0], [-1e-30, 0.0]])
    each = misalignment(a, b)
    assert each.tolist() == pytest.approx([1, 0, 0, 2], abs=1e-6)
    each.sum().backward()
    assert bool(a.grad.isfinite().all())


def test_the_penalty_is_the_one_written_out_by_hand_with_its_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = image_columns(n=6)
    x, threat = x.double(), Threat(eps=0.3)
    victim = ClassifierVictim(net, y)
    ours = GradAlign(0.7).penalty(victim, x, threat, generator_for(x.device, 1))
    random = threat.random_start(x, generator_for(x.device, 1))

    def gradient(point):
        point = point.clone().requires_grad_(True)
        return torch.autograd.grad(F.cross_entropy(net(point), y), point, create_graph=True)[0].flatten(1)

    hand = 0.7 * (1 - F.cosine_similarity(gradient(x), gradient(random))).mean()
    torch.testing.assert_close(ours.double(), hand, rtol=1e-5, atol=1e-7)
    parameters = list(net.parameters())
    for a, b in zip(
        torch.autograd.grad(ours, parameters, allow_unused=True),
        torch.autograd.grad(hand, parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_a_linear_model_has_nothing_to_align():
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), image_columns(n=6)
    penalty = GradAlign().penalty(ClassifierVictim(net, (y > 0).long()), x, Threat(eps=0.1), generator_for(x.device, 1))
    assert float(penalty) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_weight_zero_changes_nothing_and_more_does(name):
    case = CASES[name]
    alone = fit(case, AdversarialTraining(FGSM(), case.ball(0.1), PGDAT(), **case.where))
    assert_same(alone.trace, fit(case, training(case, 0)).trace)
    ours = fit(case, training(case, 2.0))
    assert ours.trainer.global_step == alone.trainer.global_step
    if name != "regression":  # a network of rectified linear units with one region: nothing turns
        assert portrait(dict(ours.module.state_dict())) != portrait(dict(alone.module.state_dict()))
    assert all(bool(p.isfinite().all()) for p in ours.module.parameters())


@pytest.mark.parametrize("settings", SETTINGS)
def test_other_trainers(settings):
    case = CASES["nasty"]
    nothing = fit(case, AdversarialTraining(FGSM(), case.ball(0.1)), **SETTINGS[settings])
    assert_same(nothing.trace, fit(case, training(case, 0), **SETTINGS[settings]).trace)
    ours = fit(case, training(case, 2.0), **SETTINGS[settings])
    assert portrait(dict(ours.module.state_dict())) != portrait(dict(nothing.module.state_dict()))


def test_within_a_ball_of_radius_zero_the_gradient_is_the_plain_one():
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)), image_columns(n=6)
    penalty = GradAlign().penalty(ClassifierVictim(net, y), x, Threat(eps=0), generator_for(x.device, 1))
    grads = torch.autograd.grad(penalty, [p for p in net.parameters() if p.ndim > 1])
    assert max(float(g.abs().max()) for g in grads) < 1e-5


def test_it_trains_towards_aligned_gradients():
    x, y = image_columns(n=40)

    def turned(weight):
        torch.manual_seed(0)
        module = TupleBatch()
        module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))
        module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), lr=0.03)
        fit(CASES["tuple"], training(CASES["tuple"], weight, 0.3), module=module, max_epochs=15, limit_val_batches=0)
        penalty = GradAlign(1.0).penalty(ClassifierVictim(module.net, y), x, Threat(eps=0.3), generator_for(x.device))
        return float(penalty)

    assert turned(5.0) < 0.5 * turned(0)


@pytest.mark.parametrize("weight", [-1, float("inf"), "1", True])
def test_bad_settings_are_named(weight):
    with pytest.raises(ValueError, match="grad_align.weight must be >= 0 and finite"):
        GradAlign(weight)
