"""Threats that count pixels, and Sparse-RS within them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from digit_models import accuracy, digits, model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_train import EOT, PGD, AutoAttack, ClassifierVictim, SparseRS, Square, Threat, UniformNoise, WorstCase
from robust_train.evasion.attacks.sparse_rs import sparse_rs
from robust_train.evasion.certified.verifier import enclosing_box

seeds = st.integers(0, 10_000)


def batch(seed, shape):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g)
    return x, x + torch.randn(shape, generator=g)


@given(seed=seeds, count=st.integers(0, 5), shape=st.sampled_from([(2, 5), (2, 3, 2, 2), (2, 2, 4)]))
@settings(deadline=None, max_examples=40)
def test_the_projection_is_the_nearest_point_of_ball_and_box(seed, count, shape):
    x, far = batch(seed, shape)
    threat = Threat("l0", count)
    out = threat.project(far, x)
    assert bool((threat.size(out, x) <= count).all())
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    inside, places = far.clamp(0, 1), math.prod(shape[1:]) if len(shape) == 2 else math.prod(shape[2:])
    flat = [t.reshape(shape[0], *((1, places) if len(shape) == 2 else (shape[1], places))) for t in (x, inside, far)]
    for row in range(shape[0]):
        a, b, c = (t[row] for t in flat)
        best = math.inf
        for kept in itertools.combinations(range(places), min(count, places)):
            point = a.clone()
            point[:, list(kept)] = b[:, list(kept)]
            best = min(best, float((point - c).square().sum()))
        found = float((out[row].reshape_as(c) - c).square().sum())
        assert found <= best + 1e-5


@given(
    seed=seeds,
    count=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
@settings(deadline=None, max_examples=40)
def test_enclose_keeps_its_promise_in_every_dtype(seed, count, dtype):
    x, far = batch(seed, (3, 3, 4, 4))
    x, threat = x.to(dtype), Threat("l0", count, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), mutable=(True, False, True))
    out = threat.enclose(far.to(dtype), x)
    assert bool((threat.size(out, x) <= count).all())
    assert torch.equal(out[:, 1], x[:, 1])
    low, high = threat.box(x)
    assert bool(((out >= low) & (out <= high)).all())
    assert count > 0 or torch.equal(out, x)


@given(seed=seeds, count=st.integers(1, 20))
@settings(deadline=None, max_examples=20)
def test_a_random_start_uses_all_the_pixels_it_may(seed, count):
    x, _ = batch(seed, (3, 3, 4, 4))
    for box in ({}, {"low": -math.inf, "high": math.inf}):
        threat = Threat("l0", count, **box)
        out = threat.random_start(x, torch.Generator().manual_seed(seed + 1))
        assert threat.size(out, x).tolist() == [min(count, 16)] * 3
        assert not box or float((out - x).abs().max()) <= 1


def test_pixels_are_whole_and_grow_in_whole_steps():
    with pytest.raises(ValueError, match="whole number of positions for norm l0, got 2.5"):
        Threat("l0", 2.5)
    assert Threat("l0", 10).scaled(0.25).eps == 2
    assert Threat("l0", 10).scaled(0.3).eps == 3
    assert Threat("l0", "10").describe() == "L0 ball of radius 10 in [0.0, 1.0]"


def test_a_proof_for_pixels_covers_their_whole_range():
    x = torch.rand(2, 1, 3, 3)
    low, high = enclosing_box(x, Threat("l0", 1, low=-5, high=255))
    assert torch.equal(low, torch.full_like(x, -5))
    assert torch.equal(high, torch.full_like(x, 255))
    assert all(torch.equal(end, x) for end in enclosing_box(x, Threat("l0", 0)))


@pytest.mark.parametrize("attack", [PGD(), AutoAttack(), Square(), WorstCase([UniformNoise(), PGD()]), EOT(PGD())])
def test_what_has_no_version_for_it_says_so(attack):
    with pytest.raises(ValueError, match="has no version for threat.norm=l0: use SparseRS"):
        attack.check(Threat("l0", 3))
    with pytest.raises(ValueError, match="has no version for threat.norm=l0: use SparseRS"):
        attack(ClassifierVictim(model(), torch.zeros(2, dtype=torch.long)), torch.rand(2, 1, 8, 8), Threat("l0", 3))


def test_sparse_rs_is_for_l0_and_finite_boxes():
    with pytest.raises(ValueError, match="SparseRS has no version for threat.norm=linf: use PGD, or threat.norm=l0"):
        SparseRS().check(Threat(eps=0.1))
    with pytest.raises(ValueError, match="must be finite"):
        SparseRS().check(Threat("l0", 3, high=math.inf))
    with pytest.raises(ValueError, match=r"sparse_rs.alpha_init must be in \(0, 1\]"):
        SparseRS(alpha_init=0)


def test_it_comes_close_to_the_best_pixels_of_a_linear_model():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(3, 5, 5, generator=g), torch.rand(4, 3, 5, 5, generator=g)

    class Linear(nn.Module):
        def forward(self, inputs):
            score = (inputs * w).flatten(1).sum(1) - 1000  # never fooled, so that it goes on
            return torch.stack([-score / 2, score / 2], 1)

    threat = Threat("l0", 3)
    out = SparseRS(queries=2000)(ClassifierVictim(Linear(), torch.zeros(4, dtype=torch.long)), x, threat)
    gain = ((out - x) * w).flatten(1).sum(1)
    each = torch.where(w > 0, w * (1 - x), -w * x).sum(1).flatten(1)
    best = each.topk(3, dim=1).values.sum(1)
    assert float((gain / best).min()) > 0.95


def test_a_few_pixels_fool_a_model_that_random_ones_do_not():
    _, _, x, y = digits()
    x, y, threat = x[:60], y[:60], Threat("l0", 4)
    victim = ClassifierVictim(model(), y, stop_when_fooled=True)
    found = SparseRS(queries=150)(victim, x, threat)
    noise = UniformNoise()(victim, x, threat)
    assert float(threat.size(found, x).max()) <= 4
    assert accuracy(model(), found, y) < accuracy(model(), noise, y) - 0.3


def test_more_pixels_than_there_are_is_all_of_them():
    x = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    net = nn.Linear(4, 3)
    out = sparse_rs(ClassifierVictim(net, torch.tensor([0, 1])), x, Threat("l0", 9), queries=20)
    assert set(out.flatten().tolist()) <= {0.0, 1.0} | set(x.flatten().tolist())
    assert torch.equal(sparse_rs(ClassifierVictim(net, torch.tensor([0, 1])), x, Threat("l0", 0), queries=20), x)
