"""Bounds of what a network returns: nothing escapes them, and nothing is bounded by guess."""

from __future__ import annotations

import pytest
import torch
from digit_models import digits, model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_train import CROWNIBP, IBP, PGD, ClassifierVictim, Threat
from robust_train.evasion.certified.interval import Interval
from robust_train.evasion.certified.verifier import (
    are_positive,
    class_differences,
    enclosing_box,
    interval_bounds,
    proved,
    verified,
    worst_case_loss,
)
from robust_train.evasion.threat_union import ThreatUnion
from robust_train.starter import MLP, SmallCNN
from robust_train.starter.small_resnet import SmallResNet

VERIFIERS = (IBP(), CROWNIBP())
ROUNDING = 1e-9  # in float64


class Residual(nn.Module):
    """Arithmetic, views and in-place operations as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True)
        self.head, self.skip = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        before = self.norm(self.conv(2 * x - 1))
        out = self.relu(before) + 0.5
        out += x / 2
        out = (1 - out).permute(0, 2, 3, 1).transpose(1, 3).contiguous()
        return self.head(out.mean(2).view(len(out), -1)) - self.skip(x.sum(dim=(2, 3)))


def layers(seed: int) -> nn.Module:
    """A random small network of many kinds of layers, for inputs (B, 2, 4, 4), in float64."""
    torch.manual_seed(seed)
    activation = [nn.ReLU, nn.Tanh, nn.LeakyReLU, nn.Softplus, nn.Sigmoid, nn.ELU, lambda: nn.ReLU(inplace=True)][
        seed % 7
    ]
    pool = [nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Identity()][seed % 4]
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=1 + seed % 2), nn.BatchNorm2d(3), activation(), nn.Dropout(), nn.Flatten()
    )
    net.insert(3, pool if seed % 2 == 0 else nn.Identity())
    width = net.eval()(torch.zeros(1, 2, 4, 4)).shape[1]
    net.extend([nn.Linear(width, 6), activation(), nn.Linear(6, 3)])
    net.train()(torch.rand(32, 2, 4, 4))  # statistics
    return net.double().eval()


def points_within(low: Tensor, high: Tensor, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    inside = [low + (high - low) * torch.rand(low.shape, generator=g, dtype=low.dtype) for _ in range(8)]
    corners = [torch.where(torch.rand(low.shape, generator=g) < 0.5, low, high) for _ in range(8)]
    return [low, high, *inside, *corners]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0, 0.5))
def test_no_point_of_the_box_escapes_the_bounds(seed, eps):
    net, g = layers(seed), torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, 4, 4, generator=g, dtype=torch.float64)
    low, high = x - eps, x + eps
    below, above = interval_bounds(net, low, high)
    logits = net(Interval.around(low, high, x))
    labels = net(x).argmax(1)
    margins = [v.margins(logits, labels) for v in VERIFIERS]
    rows, _ = class_differences(logits, labels)
    for point in points_within(low, high, seed):
        out = net(point)
        assert bool((out >= below - ROUNDING).all())
        assert bool((out <= above + ROUNDING).all())
        gaps = (rows * out[:, None]).sum(2)
        for bound in margins:
            assert bool((gaps >= bound - ROUNDING).all())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(1e-4, 0.1), norm=st.sampled_from(["linf", "l2", "l1"]))
def test_pgd_never_fools_what_is_verified(seed, eps, norm):
    net = layers(seed)
    x = torch.rand(16, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels, threat = net(x).argmax(1), Threat(norm, eps)
    found = PGD(steps=10, restarts=2)(ClassifierVictim(net, labels), x, threat)
    right = net(found).argmax(1) == labels
    for verifier in VERIFIERS:
        assert bool((right | ~verified(net, x, labels, threat, verifier)).all())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_without_a_perturbation_verified_is_right(seed):
    net = layers(seed)
    g = torch.Generator().manual_seed(seed)
    x, labels = torch.rand(16, 2, 4, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (16,), generator=g)
    for verifier in VERIFIERS:
        assert torch.equal(verified(net, x, labels, Threat(eps=0), verifier), net(x).argmax(1) == labels)


@pytest.mark.parametrize("build", [SmallCNN, MLP, lambda: SmallResNet(norm="batch")])
def test_the_starter_networks_are_bounded_as_they_are(build):
    torch.manual_seed(0)
    net, x = build().eval(), torch.rand(4, 1, 8, 8)
    logits = net(Interval.around(x - 0.01, x + 0.01, x))
    assert torch.equal(logits.point, net(x))
    for point in points_within(x - 0.01, x + 0.01, 0):
        assert bool(((net(point) >= logits.low - 1e-4) & (net(point) <= logits.high + 1e-4)).all())


def test_arithmetic_views_and_in_place_operations_are_followed():
    torch.manual_seed(0)
    net = Residual().double()
    for _ in range(3):
        net(torch.rand(8, 2, 2, 2, dtype=torch.float64))
    net.eval()
    x = torch.rand(5, 2, 2, 2, dtype=torch.float64)
    logits = net(Interval.around(x - 0.1, x + 0.1, x))
    torch.testing.assert_close(logits.point, net(x))
    labels = net(x).argmax(1)
    rows, _ = class_differences(logits, labels)
    for point in points_within(x - 0.1, x + 0.1, 1):
        out = net(point)
        assert bool(((out >= logits.low - ROUNDING) & (out <= logits.high + ROUNDING)).all())
        for verifier in VERIFIERS:
            assert bool(((rows * out[:, None]).sum(2) >= verifier.margins(logits, labels) - ROUNDING).all())


def test_the_box_of_one_linear_layer_is_exact_and_crown_is_exact_where_relus_are_settled():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double(), torch.randn(6, 4).double()
    low, high = interval_bounds(net[0], x - 0.1, x + 0.1)
    reach = 0.1 * net[0].weight.abs().sum(1)
    torch.testing.assert_close(low, net[0](x) - reach)
    torch.testing.assert_close(high, net[0](x) + reach)
    eps = 1e-6  # no ReLU changes sign, so that the network is linear in the box
    labels = net(x).argmax(1)
    margins = CROWNIBP().margins(net(Interval.around(x - eps, x + eps, x)), labels)
    for i in range(6):
        jacobian = torch.autograd.functional.jacobian(net, x[i])
        gaps = net(x[i])[labels[i]] - net(x[i]) - eps * (jacobian[labels[i]] - jacobian).abs().sum(1)
        torch.testing.assert_close(margins[i], gaps)


def test_crown_proves_no_less_than_boxes_and_more_on_a_plain_network():
    _, _, x, y = digits()
    net, threat = model(), Threat(eps=0.004)
    boxes, lines = (verified(net, x[:100], y[:100], threat, v) for v in VERIFIERS)
    assert bool((lines | ~boxes).all())
    assert int(lines.sum()) > int(boxes.sum())


def test_folding_in_the_last_layer_is_tighter_than_the_difference_of_bounds():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double(), torch.randn(6, 4).double()
    labels = net(x).argmax(1)
    logits = net(Interval.around(x - 0.1, x + 0.1, x))
    apart = logits.low.gather(1, labels[:, None]) - logits.high
    others = torch.arange(3) != labels[:, None]
    assert bool((IBP().margins(logits, labels) > apart)[others].all())


def test_one_score_an_example_is_a_problem_of_two_classes():
    torch.manual_seed(0)
    net, x = nn.Linear(4, 1).double(), torch.randn(20, 4).double()
    labels = (net(x) > 0).long()
    reach = 0.05 * net.weight.abs().sum()
    certain = (net(x).abs() > reach).flatten()
    for verifier in VERIFIERS:
        found = verified(net, x, labels, Threat(eps=0.05, low=-9, high=9), verifier)
        assert torch.equal(found, certain)
        assert not bool(verified(net, x, 1 - labels, Threat(eps=0.0, low=-9, high=9), verifier).any())


def test_eps_is_in_pixels_and_immutable_features_stay():
    x = torch.tensor([[0.2, -0.4]])
    low, high = enclosing_box(x, Threat(eps=0.1, mean=0.5, std=0.5, mutable=(True, False)))
    torch.testing.assert_close(low, torch.tensor([[0.0, -0.4]]))
    torch.testing.assert_close(high, torch.tensor([[0.4, -0.4]]))
    low, high = enclosing_box(x, Threat("l2", eps=0.1, low=-1))
    torch.testing.assert_close(high - low, torch.full((1, 2), 0.2))
    low, high = enclosing_box(x, ThreatUnion("l1", eps=0.1, low=-1, also={"linf": 0.05, "l2": 0.2}))
    torch.testing.assert_close(high - low, torch.full((1, 2), 0.4))


def test_the_worst_case_loss_bounds_the_loss_of_every_point():
    torch.manual_seed(0)
    net, x, y = layers(14), torch.rand(8, 2, 4, 4).double(), torch.arange(8) % 3
    logits = net(Interval.around(x - 0.05, x + 0.05, x))
    for verifier in VERIFIERS:
        worst = worst_case_loss(verifier.margins(logits, y), y)
        for point in points_within(x - 0.05, x + 0.05, 2):
            assert bool((worst >= nn.functional.cross_entropy(net(point), y, reduction="none") - ROUNDING).all())
    exact = net(Interval.around(x, x))
    want = nn.functional.cross_entropy(net(x), y, reduction="none")
    torch.testing.assert_close(worst_case_loss(IBP().margins(exact, y), y), want)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_margins_carry_gradients_that_finite_differences_confirm(verifier):
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.rand(5, 3).double(), [0] * 5
    labels = torch.tensor(y)

    def loss() -> Tensor:
        logits = net(Interval.around(x - 0.2, x + 0.2, x))
        return worst_case_loss(verifier.training_margins(logits, labels, 0.5), labels).sum()

    grads = torch.autograd.grad(loss(), list(net.parameters()))
    for p, grad in zip(net.parameters(), grads, strict=True):
        with torch.no_grad():
            p.view(-1)[0] += 1e-6
            up = loss()
            p.view(-1)[0] -= 2e-6
            down = loss()
            p.view(-1)[0] += 1e-6
        assert float(grad.view(-1)[0]) == pytest.approx(float(up - down) / 2e-6, rel=1e-4, abs=1e-6)


def test_batch_normalisation_in_training_takes_the_clean_batchs_statistics_and_leaves_its_own():
    norm = nn.BatchNorm1d(3).train()
    x = torch.randn(16, 3)
    before = norm.running_mean.clone()
    out = norm(Interval.around(x - 0.1, x + 0.1, x))
    assert torch.equal(norm.running_mean, before)
    torch.testing.assert_close(out.point, norm(x))
    torch.testing.assert_close(out.high - out.low, (0.2 / x.std(0, correction=0)).expand(16, 3), rtol=1e-3, atol=1e-4)


class Shapeless(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.forward = forward


REFUSED = {
    "gelu: it is not monotone; use ReLU": nn.GELU(),
    "group_norm: it divides by the spread of its input": nn.GroupNorm(1, 2),
    "softmax: return logits": nn.Softmax(1),
    "__bool__|Tensor.gt": Shapeless(lambda x: x if (x > 0).all() else -x),
    "Tensor.item: a branch": Shapeless(lambda x: x * x.mean((1, 2, 3)).item()),
    "Tensor.mul": Shapeless(lambda x: x * x),
    "Tensor.numpy": Shapeless(lambda x: torch.from_numpy(x.numpy())),
    "mixes examples": Shapeless(lambda x: x.flatten()),
    r"Tensor.mean.*mixes examples": Shapeless(lambda x: x - x.mean(0)),
    r"Tensor.permute.*mixes examples": Shapeless(lambda x: x.permute(1, 0, 2, 3)),
    "cat": Shapeless(lambda x: torch.cat([x, x], 1)),
    "Tensor.add_": Shapeless(lambda x: torch.zeros(3, 2, 4, 4).add_(x)),
    "negative slope is not monotone": nn.LeakyReLU(-0.1),
    "returns no single tensor": Shapeless(lambda x: (x, x)),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_has_no_rule_is_refused_by_its_name(says):
    x = torch.rand(3, 2, 4, 4)
    with pytest.raises(ValueError, match=says):
        interval_bounds(REFUSED[says], x, x)


def test_bounds_that_went_another_way_than_the_clean_input_prove_nothing():
    net = Shapeless(lambda x: x.flatten(1) * (2 if isinstance(x, Interval) else 1))
    x, y = torch.rand(3, 2, 4, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="something else for a box"):
        verified(net, x, y, Threat(eps=0.1), IBP())
    logits = Interval.around(x.flatten(1), x.flatten(1))
    assert proved(logits, y, IBP(), x.flatten(1)).shape == (3,)


def test_ends_must_be_in_order_and_floating_point():
    x = torch.rand(3, 2)
    with pytest.raises(ValueError, match="low must not lie above high"):
        Interval.around(x, x - 1)
    with pytest.raises(ValueError, match="one shape"):
        Interval.around(x, x[:2])
    with pytest.raises(ValueError, match="floating-point"):
        Interval.around(x.long(), x.long())
    with pytest.raises(ValueError, match=r"crown_ibp.last_beta must be in \[0, 1\], got 2"):
        CROWNIBP(last_beta=2)


def test_a_tie_is_not_verified():
    assert are_positive(torch.tensor([[0.0, 0.1], [0.0, 0.0], [0.0, -0.1]]), torch.tensor([0, 0, 0])).tolist() == [
        True,
        False,
        False,
    ]
