import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from robust_train.starter import WaveletFeatures, WaveletLinear
from robust_train.starter.once import apply_once
from robust_train.starter.wavelets import ENERGY, gaussian_windows, morlet

SHAPES = [(1, 28, 28), (1, 8, 8), (3, 32, 32), (2, 9, 13)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_image_becomes_a_row_of_its_own(shape):
    features = WaveletFeatures(shape)
    x = torch.rand(4, *shape)
    assert features(x).shape == (4, features.dim)
    torch.testing.assert_close(features(x)[2:3], features(x[2:3]), rtol=1e-4, atol=1e-4)


def test_the_number_of_features_is_that_of_the_docstring():
    assert WaveletFeatures().scales == 3
    assert WaveletFeatures((1, 8, 8)).scales == 2
    maps = {14: 1 + 6, 7: 6 + 36, 4: 6 + 2 * 36}
    assert WaveletFeatures().dim == 28 * 28 + sum(count * side**2 for side, count in maps.items()) + sum(maps.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_image_has_nearly_the_same_norm(shape):
    x = torch.rand(6, *shape) * torch.linspace(0.3, 1, 6).view(-1, 1, 1, 1)
    squares = WaveletFeatures(shape)(x).square().sum(1)
    assert squares.min() > 0.98 * ENERGY * 4.75
    assert squares.max() < 1.001 * ENERGY * 4.75


def test_blocks_follow_their_weights_and_a_weight_of_0_leaves_one_out():
    x = torch.rand(3, 1, 28, 28)
    whole = WaveletFeatures(weights=(1, 1, 1, 1, 1))(x)
    parts = [WaveletFeatures(weights=[float(i == j) for j in range(5)])(x) for i in range(5)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(WaveletFeatures(weights=(0, 0, 2, 0, 0))(x), 2 * parts[2])
    torch.testing.assert_close(parts[0], torch.nn.functional.layer_norm(x.flatten(1), (784,)) * math.sqrt(1000 / 784))


def test_with_one_scale_there_is_no_second_order():
    features = WaveletFeatures((1, 8, 8), scales=1)
    assert features.dim == 64 + 7 * 16 + 7


def test_a_wavelet_sees_waves_of_its_direction_and_scale_and_nothing_flat():
    real, imaginary = morlet(scale=1, orientations=4).double().chunk(2)
    wavelets = torch.complex(real, imaginary)
    assert wavelets.sum((-2, -1)).abs().max() < 1e-6
    axis = torch.arange(-4, 5, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    frequency = 0.75 * math.pi / 2
    responses = [
        (wavelets * torch.cos(factor * frequency * (x * math.cos(t) + y * math.sin(t)))).sum((1, 2, 3)).abs()
        for t in (0, math.pi / 2)
        for factor in (1, 0.25)
    ]
    horizontal, low, vertical, _ = responses
    assert horizontal.argmax() == 0
    assert vertical.argmax() == 2
    assert horizontal[0] > 5 * vertical[0]
    assert horizontal[0] > 3 * low[0]


@pytest.mark.parametrize(("size", "scale", "shape"), [(28, 0, (14, 28)), (28, 2, (4, 7)), (9, 1, (3, 5))])
def test_windows_average_around_equally_spread_centres(size, scale, shape):
    windows = gaussian_windows(size, scale)
    assert windows.shape == shape
    torch.testing.assert_close(windows.sum(1), torch.ones(shape[0]))
    assert windows.min() >= 0
    assert windows.argmax(1).tolist() == sorted(windows.argmax(1).tolist())


def test_features_have_a_derivative_in_every_pixel_also_of_a_flat_image():
    features = WaveletFeatures((1, 8, 8))
    for x in (torch.rand(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)):
        x.requires_grad_()
        features(x).mul(torch.rand(features.dim)).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(features.double(), (x,), atol=1e-3)


def test_nothing_is_trained_and_nothing_goes_into_a_checkpoint():
    network = WaveletLinear(WaveletFeatures((1, 8, 8)))
    assert [name for name, _ in network.named_parameters()] == ["head.weight", "head.bias"]
    assert set(network.state_dict()) == {"head.weight", "head.bias"}


def test_the_classifier_takes_images_or_their_features():
    torch.manual_seed(0)
    network = WaveletLinear(WaveletFeatures((1, 8, 8)), classes=3)
    x, y = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2] * 2)
    assert torch.equal(network(x), torch.zeros(6, 3))
    cross_entropy(network(x), y).backward()
    with torch.no_grad():
        for p in network.parameters():
            assert p.grad is not None
            p -= 0.01 * p.grad
    torch.testing.assert_close(network(network.features(x)), network(x))
    assert cross_entropy(network(x), y) < math.log(3)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="shape must be"):
        WaveletFeatures((28, 28))
    with pytest.raises(ValueError, match="orientations"):
        WaveletFeatures(orientations=0)
    with pytest.raises(ValueError, match="between 1 and 2"):
        WaveletFeatures((1, 8, 8), scales=3)
    with pytest.raises(ValueError, match="scales"):
        WaveletFeatures((1, 3, 3))
    for weights in ((1, 1), (0,) * 5, (1, 1, 1, 1, -1)):
        with pytest.raises(ValueError, match="weights"):
            WaveletFeatures(weights=weights)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_apply_once_is_the_module_applied(batch_size):
    x = torch.rand(7, 2, 3)
    module = nn.Sequential(nn.Flatten(), nn.Linear(6, 4))
    out = apply_once(module, x, batch_size)
    assert not out.requires_grad
    torch.testing.assert_close(out, module(x).detach())
