"""Input reconstructions: what they do to images, and what little is left of them under attacks that know of them."""

from __future__ import annotations

import pytest
import torch
from digit_models import digits, model
from torch import nn

from robust_train import (
    PGD,
    AdaptiveAttack,
    BitDepth,
    ClassifierVictim,
    DenoisingAutoencoder,
    GaussianSmoothing,
    MedianSmoothing,
    Threat,
)
from robust_train.evasion.gain import Gain
from robust_train.evasion.reconstruction.adaptive import in_front, reconstruction_gain
from robust_train.evasion.reconstruction.bit_depth import reduce_bit_depth
from robust_train.evasion.reconstruction.gaussian_smoothing import gaussian_blur
from robust_train.evasion.reconstruction.median_smoothing import median_filter


def kinds():
    torch.manual_seed(0)
    return [BitDepth(), MedianSmoothing(), MedianSmoothing(3), GaussianSmoothing(), DenoisingAutoencoder()]


@pytest.mark.parametrize("which", range(5))
def test_shapes_types_and_inputs_are_kept_and_constant_images_too(which, images):
    step, before = kinds()[which], images.clone()
    out = step(images)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert torch.equal(images, before)
    assert bool(((out >= -1e-6) & (out <= 1 + 1e-6)).all())
    if which < 4:
        flat = torch.full((2, 1, 8, 8), 1.0)
        torch.testing.assert_close(step(flat), flat)
        assert step.learning_loss(images, torch.Generator()) is None


def test_bit_depth_rounds_to_the_nearest_of_so_many_values(images):
    out = BitDepth(2)(images)
    assert set((out * 3).round(decimals=4).unique().tolist()) == {0, 1, 2, 3}
    assert float((out - images).abs().max()) <= 1 / 6 + 1e-6
    wide = reduce_bit_depth(images * 2 - 1, 3, -1, 1)
    torch.testing.assert_close(wide, reduce_bit_depth(images, 3) * 2 - 1)


def test_the_median_filter_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    x = torch.rand(2, 3, 7, 9)
    want = ndimage.median_filter(x.numpy(), (1, 1, 3, 3), mode="nearest")
    assert torch.equal(median_filter(x, 3), torch.tensor(want))


def test_the_blur_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    x = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    want = ndimage.gaussian_filter(x.numpy(), (0, 0, 1, 1), mode="nearest", truncate=3)
    torch.testing.assert_close(gaussian_blur(x, 1.0), torch.tensor(want))


def test_an_autoencoder_learns_to_undo_noise_and_draws_only_where_asked():
    x, _, test, _ = digits()
    torch.manual_seed(0)
    step, g = DenoisingAutoencoder(width=8, noise=0.2), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(step.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        step.learning_loss(x[torch.randint(0, len(x), (64,), generator=g)], g).backward()
        optimizer.step()
    noisy = test + 0.2 * torch.randn(test.shape, generator=g)
    assert float((step(noisy) - test).square().mean()) < 0.6 * float((noisy - test).square().mean())
    assert torch.equal(step(test), step(test))
    loud = DenoisingAutoencoder(noisy=True)
    assert not torch.equal(loud(test), loud(test))


@pytest.mark.parametrize("step", [BitDepth(3), DenoisingAutoencoder(noisy=True)])
def test_the_adaptive_attack_takes_most_of_the_apparent_gain(step):
    _, _, x, y = digits()
    gain = reconstruction_gain(model(), step, x[:60], y[:60], Threat(eps=0.1), PGD(steps=10), samples=4)
    assert gain.apparent > gain.undefended + 0.1
    assert gain.adaptive_gain < gain.apparent_gain / 2
    assert gain.adaptive <= gain.apparent
    assert gain.n == 60
    assert not model()._forward_pre_hooks


def test_through_a_step_that_has_a_gradient_the_attack_is_no_weaker_than_the_naive_one():
    _, _, x, y = digits()
    net, step = model(), GaussianSmoothing()
    victim = ClassifierVictim(net, y[:60], stop_when_fooled=True)
    with in_front(net, step):
        naive, adapted = (
            victim.score(a(victim, x[:60], Threat(eps=0.1), torch.Generator().manual_seed(0)))
            for a in (PGD(steps=10), AdaptiveAttack(PGD(steps=10), step))
        )
    assert float(adapted.sum()) <= float(naive.sum()) + 1


def test_a_gain_says_what_counts():
    gain = Gain(0.2, 0.9, 0.15, 100)
    assert gain.apparent_gain == pytest.approx(0.7)
    assert gain.adaptive_gain == pytest.approx(-0.05)
    assert str(gain) == "undefended 20.0%, apparent 90.0% (+70.0%), adaptive 15.0% (-5.0%)"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BitDepth(0), "bit_depth.bits must be a whole number >= 1, got 0"),
        (lambda: BitDepth(17), "bit_depth.bits must be from 1 to 16, got 17"),
        (lambda: BitDepth(low=1.0), "bit_depth.low must be below bit_depth.high"),
        (lambda: MedianSmoothing(1), "median_smoothing.size must be from 2 to 15, got 1"),
        (lambda: GaussianSmoothing(0), "gaussian_smoothing.sigma must be > 0"),
        (lambda: DenoisingAutoencoder(noise=0), "denoising_autoencoder.noise must be > 0"),
        (lambda: DenoisingAutoencoder(noisy="no"), "denoising_autoencoder.noisy must be true or false, got 'no'"),  # type: ignore[arg-type]
        (lambda: AdaptiveAttack(PGD(), BitDepth(), 0), "adaptive_attack.samples"),
        (lambda: MedianSmoothing()(torch.rand(3, 4)), "median_smoothing is for images"),
        (lambda: DenoisingAutoencoder(3)(torch.rand(2, 1, 8, 8)), "channels is 3, and the images have 1"),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_only_tensors_are_reconstructed_and_parts_must_be_of_their_kind():
    net = nn.Identity()
    with in_front(net, BitDepth()), pytest.raises(ValueError, match="Identity must be called with a tensor first"):
        net({"x": 1})
    with pytest.raises(TypeError, match="adaptive_attack.reconstruction must be a robust_train Reconstruction"):
        AdaptiveAttack(PGD(), nn.Identity())  # type: ignore[arg-type]
