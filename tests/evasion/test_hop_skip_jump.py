"""The decision-based attack."""

from __future__ import annotations

import pytest
import torch
from digit_models import digits, model
from torch import nn

from robust_train import ClassifierVictim, Threat, UniformNoise, Victim
from robust_train.evasion.attacks.hop_skip_jump import HopSkipJump, hop_skip_jump


class LabelsOnly(Victim):
    """Tells nothing but whether it was right, and counts the inputs that it was asked about."""

    provides = frozenset({"loss", "logits", "labels"})

    def __init__(self, net, labels, asked=None):
        self.net, self.labels, self.asked = net, labels, [0] if asked is None else asked

    def loss(self, x):
        raise AssertionError("asked for a loss")

    def logits(self, x):
        raise AssertionError("asked for logits")

    def score(self, x):
        self.asked[0] += len(x)
        assert not torch.is_grad_enabled() or not x.requires_grad
        with torch.no_grad():
            return (self.net(x).argmax(1) == self.labels).float()

    def take(self, index):
        return LabelsOnly(self.net, self.labels[index], self.asked)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 1.0)])
def test_with_labels_only_it_finds_what_noise_does_not(norm, eps):
    _, _, x, y = digits()
    x, y, threat = x[:40], y[:40], Threat(norm, eps)
    victim = LabelsOnly(model(), y)
    found = 1 - float(victim.score(HopSkipJump(queries=1000)(victim, x, threat)).mean())
    judged = ClassifierVictim(model(), y)
    noise = 1 - float(judged.score(UniformNoise(draws=200)(judged, x, threat)).mean())
    assert found > 0.5
    assert found > noise + 0.2


@pytest.mark.parametrize("queries", [1, 40, 333])
def test_it_keeps_its_budget(queries):
    _, _, x, y = digits()
    victim = LabelsOnly(model(), y[:10])
    HopSkipJump(queries=queries)(victim, x[:10], Threat(eps=0.2))
    assert victim.asked[0] <= queries * 10


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_questions_bring_it_nearer_and_what_it_returns_is_misclassified(norm):
    _, _, x, y = digits()
    net, x, y = model(), x[:20], y[:20]
    right = net(x).argmax(1) == y
    victim, threat, sizes = ClassifierVictim(net, y), Threat(norm), []
    for queries in (100, 400, 1200):
        out = hop_skip_jump(victim, x, threat, queries=queries)
        assert bool((victim.score(out) == 0).all())
        assert torch.equal(out[~right], x[~right])
        sizes.append(float(threat.size(out, x).median()))
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_model_it_comes_near_the_boundarys_distance(norm):
    g = torch.Generator().manual_seed(0)
    net = nn.Linear(10, 2)
    net.weight.data, net.bias.data = torch.randn(2, 10, generator=g), torch.zeros(2)
    x = torch.randn(20, 10, generator=g)
    scores = net(x).detach()
    dual = 1 if norm == "linf" else 2
    slope = torch.linalg.vector_norm((net.weight[1] - net.weight[0]).detach(), ord=dual)
    distance = (scores[:, 1] - scores[:, 0]).abs() / slope
    threat = Threat(norm, low=float("-inf"), high=float("inf"))
    out = hop_skip_jump(ClassifierVictim(net, scores.argmax(1)), x, threat, queries=3000)
    ratio = threat.size(out, x) / distance
    assert float(ratio.min()) >= 1 - 1e-4
    assert float(ratio.median()) < 1.3


def test_examples_leave_once_they_are_fooled_within_the_ball():
    _, _, x, y = digits()
    x, y = x[:30], y[:30]
    everyone, judged = LabelsOnly(model(), y), LabelsOnly(model(), y)
    judged.stop_when_fooled = True
    threat = Threat(eps=0.3)
    HopSkipJump(queries=1000)(everyone, x, threat)
    out = HopSkipJump(queries=1000)(judged, x, threat)
    assert judged.asked[0] < everyone.asked[0] / 2
    assert float(judged.score(out).mean()) < 0.3


def test_a_constant_model_is_left_alone(images, labels):
    victim = LabelsOnly(lambda x: nn.functional.one_hot(labels[: len(x)], 10), labels)
    assert torch.equal(HopSkipJump(queries=50)(victim, images, Threat(eps=0.2)), images)


def test_the_norm_l1_and_bad_settings_are_refused(images, labels):
    with pytest.raises(ValueError, match="norms linf and l2, but threat.norm is l1"):
        HopSkipJump()(LabelsOnly(None, labels), images, Threat("l1", 1.0))
    with pytest.raises(ValueError, match=r"hop_skip_jump.queries must be a whole number >= 1, got 0"):
        HopSkipJump(queries=0)
    with pytest.raises(ValueError, match=r"hop_skip_jump.samples"):
        HopSkipJump(samples=2.5)  # type: ignore[arg-type]
