"""Threat: settings, geometry, and the promise that nothing leaves ball and box."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_train import Threat
from robust_train.evasion.threat import _project_l1

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def test_eps_as_a_fraction():
    assert Threat(eps="8/255").eps == 8 / 255
    assert Threat(eps="0.3").eps == 0.3
    assert Threat(eps=0).eps == 0.0


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"norm": "l7"}, "threat.norm must be one of linf, l2, l1"),
        ({"eps": -1}, "threat.eps must be >= 0"),
        ({"eps": math.nan}, "threat.eps"),
        ({"eps": math.inf}, "threat.eps"),
        ({"eps": "a lot"}, "a number or a fraction"),
        ({"eps": "1/0"}, "a number or a fraction"),
        ({"eps": True}, "a number or a fraction"),
        ({"eps": None}, "a number or a fraction"),
        ({"low": 1.0, "high": 0.0}, "low must be below"),
        ({"low": (0.0, 0.0), "high": (1.0, 1.0, 1.0)}, "as many of each"),
        ({"mean": (0.5,)}, "belong together"),
        ({"mean": 0.5, "std": 0.0}, "std must be > 0"),
        ({"mean": (), "std": ()}, "at least one number"),
    ],
)
def test_bad_settings_are_named(bad, says):
    with pytest.raises(ValueError, match=says):
        Threat(**bad)


@settings(max_examples=60, deadline=None)
@given(
    norm=st.sampled_from(("linf", "l2", "l1")),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from((1e-4, 2 / 255, 0.1, 0.5, 3.0)),
    normalised=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_enclose_keeps_ball_and_box_in_every_dtype(norm, dtype, eps, normalised, seed):
    g = torch.Generator().manual_seed(seed)
    threat = Threat(norm, eps, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1)) if normalised else Threat(norm, eps)
    pixels = torch.rand(4, 3, 5, 5, generator=g, dtype=torch.float64)
    x = threat.from_pixels(pixels).to(dtype)
    x_adv = (x.double() + 2 * eps * torch.randn(x.shape, generator=g, dtype=torch.float64)).to(dtype)
    out = threat.enclose(x_adv, x)
    assert out.dtype == dtype
    assert bool((threat.size(out, x) <= eps * (1 + 1e-6)).all())
    low, high = threat.box(x.double())
    slack = 1e-12
    assert bool((out.double() >= low - slack).all())
    assert bool((out.double() <= high + slack).all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_zero_returns_x_bit_for_bit(norm, dtype):
    threat = Threat(norm, 0, mean=(0.3,), std=(0.7,))
    x = threat.from_pixels(torch.rand(3, 1, 4, 4)).to(dtype)  # the extremes may round to just outside of the box
    x[0, 0, 0, 0] = threat.from_pixels(torch.ones(1, 1)).to(dtype).item()
    assert torch.equal(threat.enclose(torch.randn_like(x), x), x)
    assert torch.equal(threat.random_start(x, torch.Generator().manual_seed(0)), x)


def test_what_is_not_a_number_counts_as_not_perturbed():
    x = torch.rand(2, 3)
    assert torch.equal(Threat(eps=0.1).enclose(torch.full_like(x, math.nan), x), x)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_immutable_features_stay(norm):
    threat = Threat(norm, 0.5, low=(-1.0, 0.0, -math.inf), high=(1.0, 10.0, math.inf), mutable=(True, False, True))
    x = torch.tensor([[0.9, 5.0, -3.0], [0.0, 1.0, 7.0]])
    out = threat.enclose(x + torch.tensor([5.0, 5.0, -5.0]), x)
    assert torch.equal(out[:, 1], x[:, 1])
    assert float(out[:, 0].max()) <= 1.0
    step = threat.ascend(torch.ones_like(x), 0.1)
    if norm != "linf":
        assert torch.equal(step[:, 1], torch.zeros(2))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_start_fills_the_ball(norm):
    threat = Threat(norm, 2.0, low=-math.inf, high=math.inf)
    x = torch.zeros(4000, 3)
    sizes = threat.size(threat.random_start(x, torch.Generator().manual_seed(0)), x)
    assert float(sizes.max()) <= 2.0 * (1 + 1e-6)
    # uniform in a 3-dimensional ball: the radius below which half of the points lie is eps * 2 ** (-1/3)
    assert float(sizes.median()) == pytest.approx(2.0 * 2 ** (-1 / 3), rel=0.03)


def test_l1_projection_is_the_nearest_point():
    g = torch.Generator().manual_seed(0)
    delta, room = torch.randn(50, 12, generator=g, dtype=torch.float64), torch.rand(50, 12, generator=g).double()
    eps = 1.0
    nearest = _project_l1(delta, room, eps, iterations=60)
    assert bool((nearest.abs().sum(1) <= eps + 1e-9).all())
    assert bool((nearest.abs() <= room + 1e-12).all())
    for _ in range(200):  # no other feasible point is nearer
        other = torch.minimum(torch.rand(delta.shape, generator=g).double() * 2, room) * delta.sign()
        other = other * (eps / other.abs().sum(1, keepdim=True)).clamp(max=1)
        assert bool(((other - delta).norm(dim=1) >= (nearest - delta).norm(dim=1) - 1e-9).all())


def test_normalised_data_has_the_same_eps_in_pixels():
    pixels = torch.rand(2, 3, 4, 4)
    threat = Threat(eps=0.1, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    x = threat.from_pixels(pixels)
    assert torch.allclose(threat.to_pixels(x), pixels, atol=1e-6)
    out = threat.enclose(x + 100, x)
    assert torch.allclose(threat.to_pixels(out), (pixels + 0.1).clamp(max=1), atol=1e-6)


def test_a_threat_for_other_channels_is_refused():
    with pytest.raises(ValueError, match="3 values a feature"):
        Threat(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1)).box(torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("x", "kind", "says"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), TypeError, "uint8, and only floating-point"),
        (torch.randn(8, 1, 8, 8) * 2, ValueError, "threat.mean"),
        (torch.rand(2, 1, 4, 4) * 255, ValueError, "divide the data by 255"),
    ],
)
def test_inputs_that_the_threat_does_not_describe_are_refused(x, kind, says):
    with pytest.raises(kind, match=says):
        Threat().check_input(x)


def test_inputs_that_fit_pass():
    Threat().check_input(torch.rand(2, 3))
    Threat(mean=0.5, std=0.5).check_input(torch.rand(2, 3) * 2 - 1)
    Threat(low=-math.inf, high=math.inf).check_input(torch.randn(2, 3) * 1e6)
