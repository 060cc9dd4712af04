"""The objectives MART and ALP, each against a computation written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robust_train import ALP, MART, ClassifierVictim
from robust_train.evasion.objectives.alp import logit_distance
from robust_train.evasion.objectives.mart import rows_of, runner_up_penalty, weighted_divergence


def by_hand(logits, logits_adv, labels, beta):
    """MART's loss of each example, as the paper writes it, with plain numbers."""
    each = []
    for clean, adv, y in zip(logits.tolist(), logits_adv.tolist(), labels.tolist(), strict=True):
        p, q = ([math.exp(s) / sum(math.exp(t) for t in z) for s in z] for z in (clean, adv))
        boosted = -math.log(q[y]) - math.log(1 - max(s for k, s in enumerate(q) if k != y))
        each.append(boosted + beta * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * (1 - p[y]))
    return torch.tensor(each)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, generator=g)
    return x, x + 0.3 * torch.randn(6, 4, generator=g), torch.tensor([0, 1, 2, 0, 1, 2])


def test_mart_with_cross_entropy_is_the_papers_loss_example_by_example(linear, batch):
    x, x_adv, labels = batch
    logits, adv = linear(x), linear(x_adv)
    each = F.cross_entropy(adv, labels, reduction="none") + runner_up_penalty(adv, labels)
    each = each + 5 * weighted_divergence(logits, adv, labels)
    want = by_hand(logits, adv, labels, beta=5)
    torch.testing.assert_close(each.detach(), want, rtol=1e-5, atol=1e-6)
    own = F.cross_entropy(adv, labels)
    part = MART(beta=5).part(ClassifierVictim(linear, labels), x, x_adv, adv)
    assert part is not None
    torch.testing.assert_close((own + part).detach(), want.mean(), rtol=1e-5, atol=1e-6)


def test_marts_gradients_are_those_of_the_written_out_loss(linear, batch):
    x, x_adv, labels = batch
    x, x_adv = x.double(), x_adv.double()
    net = linear.double()
    own = F.cross_entropy(adv := net(x_adv), labels)
    ours = torch.autograd.grad(own + MART().part(ClassifierVictim(net, labels), x, x_adv, adv), list(net.parameters()))
    p, q = net(x).softmax(1), net(x_adv).softmax(1)
    q_y, others = q.gather(1, labels[:, None]).squeeze(1), q.scatter(1, labels[:, None], 0).amax(1)
    kl = (p * (p.log() - q.log())).sum(1)
    loss = (-q_y.log() - (1 - others).log() + 5 * kl * (1 - p.gather(1, labels[:, None]).squeeze(1))).mean()
    for a, b in zip(ours, torch.autograd.grad(loss, list(net.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_marts_divergence_adds_nothing_where_nothing_was_perturbed(linear, batch):
    x, _, labels = batch
    scores, adv = linear(x), linear(x)
    divergence = weighted_divergence(scores, adv, labels).sum()
    assert abs(float(divergence)) < 1e-6
    grads = torch.autograd.grad(divergence, list(linear.parameters()))
    assert max(float(g.abs().max()) for g in grads) < 1e-6


def test_the_penalty_stays_finite_where_the_model_is_sure_of_the_wrong_class():
    scores = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    penalty = runner_up_penalty(scores, torch.tensor([0]))
    assert float(penalty) == pytest.approx(200 - math.log(2), rel=1e-5)
    (grad,) = torch.autograd.grad(penalty.sum(), scores)
    assert bool(grad.isfinite().all())


def test_mart_reads_every_kind_of_classification():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 3, generator=g), torch.tensor([0, 2, 1, 0, 2])
    hard = rows_of(logits, labels)
    soft = rows_of(logits, F.one_hot(labels, 3).float() * 0.9 + 1 / 30)
    assert all(torch.equal(a, b) for a, b in zip(hard, soft, strict=True))
    scores, truth, known = rows_of(torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [0.0]]))
    assert scores.tolist() == [[0.0, 2.0], [0.0, -1.0]]
    assert truth.tolist() == [1, 0]
    assert known.tolist() == [True, True]
    dense, masks = torch.randn(2, 3, 4, 4, generator=g), torch.randint(0, 3, (2, 4, 4), generator=g)
    masks[0, :2] = 255  # no label
    scores, truth, known = rows_of(dense, masks)
    assert scores.shape == (32, 3)
    assert torch.equal(scores[5], dense[0, :, 1, 1])
    assert int(known.sum()) == 24
    victim = ClassifierVictim(lambda x: x, masks)
    part = MART().part(victim, dense, dense + 0.1, dense + 0.1)
    rows = runner_up_penalty(*rows_of(dense + 0.1, masks)[:2])[known]  # equal shifts: no divergence
    torch.testing.assert_close(part, rows.mean())


def test_alp_is_the_mix_of_both_losses_and_the_squared_distance(linear, batch):
    x, x_adv, labels = batch
    logits, adv = linear(x), linear(x_adv)
    distances = [
        sum((a - b) ** 2 for a, b in zip(z, w, strict=True)) / 3
        for z, w in zip(logits.tolist(), adv.tolist(), strict=True)
    ]
    torch.testing.assert_close(logit_distance(logits, adv).detach(), torch.tensor(distances))
    objective = ALP(weight=0.7, clean_weight=0.2)
    part = objective.part(ClassifierVictim(linear, labels), x, x_adv, adv)
    assert part is not None
    own = F.cross_entropy(adv, labels)
    want = 0.8 * own + 0.2 * F.cross_entropy(logits, labels) + 0.7 * sum(distances) / 6
    torch.testing.assert_close(objective.own_weight * own + part, want)
    alone = ALP(weight=0.7, clean_weight=0.0).part(ClassifierVictim(linear, labels), x, x_adv, adv)
    assert float(alone) == pytest.approx(0.7 * sum(distances) / 6, rel=1e-5)


def test_alp_has_the_plain_gradient_where_nothing_was_perturbed(linear, batch):
    x, _, labels = batch
    adv, objective = linear(x), ALP()
    own = F.cross_entropy(adv, labels)
    loss = objective.own_weight * own + objective.part(ClassifierVictim(linear, labels), x, x, adv)
    ours = torch.autograd.grad(loss, list(linear.parameters()), retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(own, list(linear.parameters())), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MART(beta=-1), r"mart.beta must be >= 0 and finite, got -1"),
        (lambda: MART(beta="5"), r"mart.beta"),
        (lambda: ALP(weight=-1), r"alp.weight must be in \[0, inf\), got -1"),
        (lambda: ALP(clean_weight=1.0), r"alp.clean_weight must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("objective", [MART(), ALP()])
def test_logits_are_needed(objective, linear, batch):
    x, x_adv, labels = batch
    with pytest.raises(ValueError, match="needs the logits of the training step"):
        objective.part(ClassifierVictim(linear, labels), x, x_adv, None)
