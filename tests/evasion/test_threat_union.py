"""Threats of several norms, and an attack within each of them."""

from __future__ import annotations

import pytest
import torch
from digit_models import digits, model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_train import FGSM, PGD, ClassifierVictim, EachThreat, Square, Threat, ThreatUnion, evaluate

LOOSE = {"low": -float("inf"), "high": float("inf")}


def test_the_members_share_everything_but_norm_and_radius():
    union = ThreatUnion("l2", "1/2", low=-1.0, mean=0.1, std=0.2, also={"linf": "8/255", "l1": 3})
    assert union.members == (
        Threat("l2", 0.5, low=-1.0, mean=0.1, std=0.2),
        Threat("linf", 8 / 255, low=-1.0, mean=0.1, std=0.2),
        Threat("l1", 3, low=-1.0, mean=0.1, std=0.2),
    )
    assert [member.radius for member in union.scaled(0.5).members] == pytest.approx([0.25, 4 / 255, 1.5])
    assert union.describe().startswith("union of L2 ball of radius 0.5 and Linf ball of radius 0.0313725 and L1 ball")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 3.0), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_enclosed_inputs_lie_in_one_of_the_balls(seed, size, dtype):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(5, 3, 4, generator=g).to(dtype)
    wild = x + size * torch.randn(5, 3, 4, generator=g).to(dtype)
    union = ThreatUnion(eps=0.1, also={"l2": 0.5, "l1": 1.0})
    inside = union.enclose(wild, x)
    assert inside.dtype == dtype
    within = [member.size(inside, x) <= member.radius * (1 + 1e-6) for member in union.members]
    assert bool(torch.stack(within).any(0).all())
    assert float(inside.min()) >= 0
    assert float(inside.max()) <= 1


def test_what_lies_in_any_ball_is_left_alone():
    x = torch.full((2, 8), 0.5)
    spread, one = x[:1] + 0.1, x[1:].clone()
    one[0, 0] = 0.9  # far in one entry only: outside of Linf 0.1, inside L2 0.5
    x_adv = torch.cat([spread, one])
    union = ThreatUnion(eps=0.1001, also={"l2": 0.5})
    torch.testing.assert_close(union.enclose(x_adv, x), x_adv)
    assert torch.equal(ThreatUnion(eps=0, also={"l2": 0}).enclose(x_adv, x), x)


def test_each_example_is_given_the_ball_that_hurts_it_most():
    """A linear model's loss rises by eps times the dual norm of its weights, whatever the example."""
    net = nn.Linear(16, 2).double()
    x, y = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    w = (net.weight[0] - net.weight[1]).detach()
    gains = {"linf": 0.05 * float(w.abs().sum()), "l2": 0.3 * float(w.norm())}
    union = ThreatUnion(eps=0.05, also={"l2": 0.3}, **LOOSE)
    victim = ClassifierVictim(net, y)
    x_adv = EachThreat(PGD(steps=20))(victim, x, union)

    def margin(z):
        found = net(z).detach()
        return found.gather(1, y[:, None]).squeeze(1) - found.gather(1, 1 - y[:, None]).squeeze(1)

    torch.testing.assert_close(
        margin(x) - margin(x_adv), torch.full((6,), max(gains.values()), dtype=torch.float64), rtol=0.05, atol=1e-6
    )


def test_random_takes_one_ball_for_a_batch():
    x, y, _, _ = digits()
    union = ThreatUnion(eps=0.1, also={"l2": 0.5})
    kinds = set()
    for seed in range(12):
        victim = ClassifierVictim(model(), y[:8])
        x_adv = EachThreat(FGSM(), "random")(victim, x[:8], union, torch.Generator().manual_seed(seed))
        inside = [bool((m.size(x_adv, x[:8]) <= m.radius * (1 + 1e-6)).all()) for m in union.members]
        assert any(inside)
        kinds.add(tuple(inside))
    assert len(kinds) == 2


def test_within_a_plain_threat_it_is_the_attack_itself():
    x, y, _, _ = digits()
    victim, threat = ClassifierVictim(model(), y[:8]), Threat(eps=0.1)
    assert torch.equal(EachThreat(PGD(steps=2))(victim, x[:8], threat), PGD(steps=2)(victim, x[:8], threat))


def test_the_union_is_never_more_robust_than_one_of_its_balls():
    _, _, x, y = digits()
    loader = [(x[:60], y[:60])]
    union = ThreatUnion(eps=0.08, also={"l2": 0.5})
    both = evaluate(model(), loader, union, EachThreat(PGD(steps=10)))
    alone = [evaluate(model(), loader, member, PGD(steps=10)).robust_acc for member in union.members]
    assert both.robust_acc <= min(alone)
    assert both.robust_acc < both.clean_acc


@pytest.mark.parametrize("attack", [PGD(), FGSM(), FGSM(noise=1), Square(queries=5)], ids=repr)
def test_attacks_for_one_ball_are_refused(attack, net, images, labels):
    with pytest.raises(ValueError, match="give EachThreat"):
        attack(ClassifierVictim(net, labels), images, ThreatUnion())


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: ThreatUnion(also={}), ValueError, "threat.also must hold radii by norm"),
        (lambda: ThreatUnion(also={"linf": 1}), ValueError, "threat.also must hold norms of l2, l1, l0, got 'linf'"),
        (lambda: ThreatUnion(also={"l2": -1}), ValueError, "eps must be >= 0"),
        (lambda: ThreatUnion(also={"l2": "far"}), ValueError, "threat.also.l2 must be a number"),
        (lambda: EachThreat("pgd"), TypeError, "each_threat.attack"),
        (lambda: EachThreat(EachThreat()), TypeError, "another robust_train Attack"),
        (lambda: EachThreat(choose="max"), ValueError, "each_threat.choose must be one of worst, random"),
    ],
)
def test_bad_settings_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()
