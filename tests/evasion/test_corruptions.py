"""Natural corruptions."""

from __future__ import annotations

import pytest
import torch
from digit_models import digits, model

from robust_train import Corruptions, Threat, evaluate
from robust_train.evasion.corruptions import KINDS, SEVERITIES, corrupt

SMOOTH = ("gaussian_blur", "defocus_blur", "pixelate", "jpeg")


def pictures(channels: int = 3, side: int = 32) -> torch.Tensor:
    """Waves of several lengths, in [0, 1]."""
    line = torch.linspace(0, 1, side)
    waves = [torch.sin(9 * line)[:, None] * torch.cos(6 * line + k)[None, :] for k in range(2 * channels)]
    return (torch.stack(waves).view(2, channels, side, side) + 1) / 2


def drawn(x, kind, severity, seed=0):
    return corrupt(x, kind, severity, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_within_the_range_grows_with_severity_and_can_be_repeated(kind):
    x = pictures()
    before = x.clone()
    sizes = []
    for severity in SEVERITIES:
        out = drawn(x, kind, severity)
        assert out.shape == x.shape
        assert 0 <= float(out.min()) <= float(out.max()) <= 1
        assert torch.equal(out, drawn(x, kind, severity))
        sizes.append(float((out - x).abs().mean()))
    assert torch.equal(x, before)
    assert all(later > 0.9 * earlier for earlier, later in zip(sizes, sizes[1:], strict=False))
    assert 0 < sizes[0] < sizes[-1]
    if kind.endswith("noise"):
        assert not torch.equal(drawn(x, kind, 3), drawn(x, kind, 3, seed=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 3, 28, 20), (1, 4, 7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_size_number_of_channels_and_precision(kind, shape, dtype):
    out = drawn(torch.rand(shape).to(dtype), kind, 5)
    assert out.shape == shape
    assert out.dtype == dtype
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("kind", SMOOTH)
def test_a_flat_picture_has_nothing_to_blur(kind):
    x = torch.full((1, 1, 16, 16), 128 / 255)
    torch.testing.assert_close(drawn(x, kind, 5), x, atol=2e-3, rtol=0)


def test_strengths_in_known_cases():
    x = torch.full((50, 1, 32, 32), 0.5)
    assert float(drawn(x, "gaussian_noise", 5).std()) == pytest.approx(0.1, rel=0.02)
    assert float(drawn(x, "shot_noise", 5).std()) == pytest.approx((0.5 / 50) ** 0.5, rel=0.02)
    struck = drawn(x, "impulse_noise", 5)
    assert float((struck == 0).float().mean()) == pytest.approx(0.035, rel=0.1)
    assert float((struck == 1).float().mean()) == pytest.approx(0.035, rel=0.1)
    assert float(drawn(x, "brightness", 5).mean()) == pytest.approx(0.8)
    waves = pictures()
    torch.testing.assert_close(drawn(waves, "contrast", 5).std((2, 3)), 0.15 * waves.std((2, 3)))


def test_compression_is_that_of_its_quality():
    """With the finest table, whose steps are all 1, each pixel is right to within a few levels of 255."""
    from robust_train.evasion.corruptions import jpeg

    x = pictures(1, 24)
    fine = jpeg(x, 100, torch.Generator())
    assert float((fine - x).abs().max()) < 4 / 255
    coarse = jpeg(x, 5, torch.Generator())
    assert float((coarse - x).abs().max()) > 20 / 255


def test_normalised_data_are_corrupted_in_pixels():
    x, threat = pictures(3), Threat(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    some = Corruptions(["gaussian_noise", "jpeg"], [2])
    plain = dict(some.of(x, Threat(), 7))
    for name, images in some.of(threat.from_pixels(x), threat, 7):
        torch.testing.assert_close(threat.to_pixels(images), plain[name], atol=1e-5, rtol=0)
    of_bytes = dict(some.of(255 * x, Threat(high=255.0), 7))
    torch.testing.assert_close(of_bytes["jpeg/2"] / 255, plain["jpeg/2"], atol=1e-5, rtol=0)


def test_evaluate_measures_the_mean_over_kinds():
    _, _, x, y = digits()
    loader = [(x[:100], y[:100])]
    asked = Corruptions(["contrast", "gaussian_noise"], [1, 5])
    found = evaluate(model(), loader, Threat(eps=0.0), corruptions=asked, checks=False)
    assert tuple(found.corruptions) == asked.names
    assert found.corruptions["contrast/5"].value < found.corruptions["contrast/1"].value <= found.clean_acc + 0.02
    each = [rate.value for rate in found.corruptions.values()]
    assert found.corruption_acc == pytest.approx(sum(each) / 4)
    assert found == evaluate(model(), loader, Threat(eps=0.0), corruptions=asked, checks=False)
    assert evaluate(model(), loader, Threat(eps=0.0), checks=False).corruption_acc is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Corruptions(["snow"]), "corruptions.kinds must be among gaussian_noise.*got 'snow'"),
        (lambda: Corruptions([]), "corruptions.kinds must be a list"),
        (lambda: Corruptions("jpeg"), "corruptions.kinds must be a list"),
        (lambda: Corruptions(["jpeg", "jpeg"]), "different ones"),
        (lambda: Corruptions(severities=[0]), "corruptions.severities must be among 1, 2, 3, 4, 5, got 0"),
        (lambda: Corruptions(severities=[True]), "corruptions.severities"),
        (lambda: list(Corruptions().of(torch.rand(2, 5), Threat())), r"images \(B, C, H, W\), got \(2, 5\)"),
        (lambda: list(Corruptions().of(torch.rand(1, 1, 4, 4), Threat(low=-torch.inf))), "finite range"),
    ],
)
def test_what_cannot_be_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
